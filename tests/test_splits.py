from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cellseg.data.groups import dsb2018, group_of
from cellseg.data.splits import SIDES, Recipe, Split, extended, make_split, split_in_force
from cellseg.errors import InputError

HUNDRED = [f"image{number:03d}" for number in range(100)]


def sizes(split: Split) -> tuple[int, ...]:
    return tuple(len(split.sides[side]) for side in SIDES)


def side_of(split: Split) -> dict[str, str]:
    return {sample: side for side in SIDES for sample in split.sides[side]}


def test_the_projects_split_has_its_published_sizes() -> None:
    listed = dsb2018()
    split = make_split(list(listed), Recipe())
    assert sizes(split) == (529, 65, 70)
    assert split.left_out == []
    assert side_of(split) == {sample: row["split"] for sample, row in listed.items()}


def test_the_projects_split_has_no_field_on_two_sides() -> None:
    listed = dsb2018()
    sides = side_of(make_split(list(listed), Recipe()))
    fields = {sample: row["field"] for sample, row in listed.items()}
    assert Counter(fields.values()).most_common(1)[0][1] >= 4  # fields are groups of images
    assert len({(fields[sample], side) for sample, side in sides.items()}) == len(
        set(fields.values())
    )


def test_one_known_image_brings_the_projects_split_and_others_are_left_out() -> None:
    known = next(iter(dsb2018()))
    split = make_split(["mine", known], Recipe())
    assert side_of(split) == {known: dsb2018()[known]["split"]}
    assert split.left_out == ["mine"]
    assert "DSB2018" in split.name


@pytest.mark.parametrize("options", [{"split": "random"}, {"groups": "."}, {"folds": 3}])
def test_the_projects_split_gives_way_to_what_was_asked_for(options: dict[str, Any]) -> None:
    ids = [*"abcdefghi", next(iter(dsb2018()))]
    split = make_split(ids, Recipe(**options))
    assert sorted(side_of(split)) == sorted(ids)
    assert split.left_out == []


@pytest.mark.parametrize(
    ("count", "expected"), [(100, (80, 10, 10)), (20, (16, 2, 2)), (3, (1, 1, 1)), (2, (1, 1, 0))]
)
def test_a_random_split_is_80_10_10_and_never_without_train_and_validation(
    count: int, expected: tuple[int, int, int]
) -> None:
    for seed in range(5):
        split = make_split(HUNDRED[:count], Recipe(seed=seed))
        assert sizes(split) == expected
        assert sorted(side_of(split)) == HUNDRED[:count]


def test_one_image_is_too_few() -> None:
    with pytest.raises(InputError, match="1 annotated image is too few"):
        make_split(["a"], Recipe())


def test_a_random_split_depends_on_the_seed_alone() -> None:
    shuffled = np.random.default_rng(0).permutation(HUNDRED).tolist()
    assert make_split(HUNDRED, Recipe(seed=3)).sides == make_split(shuffled, Recipe(seed=3)).sides
    tests = {tuple(make_split(HUNDRED, Recipe(seed=seed)).sides["test"]) for seed in range(20)}
    assert len(tests) == 20


def random_groups(rng: np.random.Generator, tmp_path: Path) -> tuple[dict[str, str], str]:
    """Images in groups of uneven sizes, and the CSV that says so."""
    count = int(rng.integers(8, 60))
    groups = rng.integers(0, rng.integers(2, 9), count)
    group_of = {f"i{number}": f"g{group}" for number, group in enumerate(groups)}
    table = tmp_path / "groups.CSV"
    table.write_text("image_id,group\n" + "".join(f"{i},{g}\n" for i, g in group_of.items()))
    return group_of, str(table)


def test_groups_are_taken_until_a_side_is_large_enough() -> None:
    quads = [f"{number // 4:02d}-{number}" for number in range(100)]
    assert sizes(make_split(quads, Recipe(groups=r"^\d+"))) == (76, 12, 12)


def test_of_two_groups_one_is_left_to_train_on() -> None:
    halves = [f"{number % 2}-{number}" for number in range(100)]
    assert sizes(make_split(halves, Recipe(groups="^."))) == (50, 50, 0)


def test_a_group_is_never_on_two_sides(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for seed in range(40):
        group_of, table = random_groups(rng, tmp_path)
        groups = set(group_of.values())
        for folds in (0, 3)[: 1 + (len(groups) >= 3)]:
            split = make_split(list(group_of), Recipe(groups=table, folds=folds, seed=seed))
            sides = side_of(split)
            assert sides.keys() == group_of.keys()
            assert sum(sizes(split)) == len(group_of)
            pairs = {(group_of[sample], side) for sample, side in sides.items()}
            assert len(pairs) == len(groups)
            assert split.sides["train"] and split.sides["val"]


@pytest.mark.parametrize("folds", [3, 5, 7])
def test_over_all_folds_each_group_tests_once_and_validates_once(
    tmp_path: Path, folds: int
) -> None:
    group_of = {f"i{number:02d}": f"g{number % 7}" for number in range(24)}
    table = tmp_path / "groups.csv"
    table.write_text("image_id,group\n" + "".join(f"{i},{g}\n" for i, g in group_of.items()))
    splits = [
        make_split(list(group_of), Recipe(groups=str(table), folds=folds, fold=f))
        for f in range(folds)
    ]
    for side in ("test", "val"):
        seen = [sample for split in splits for sample in split.sides[side]]
        assert sorted(seen) == sorted(group_of)
    for fold, split in enumerate(splits):
        assert sorted(side_of(split)) == sorted(group_of)
        assert sum(sizes(split)) == len(group_of)
        assert split.sides["val"] == splits[(fold + 1) % folds].sides["test"]


@pytest.mark.parametrize(("folds", "fold"), [(2, 0), (11, 0), (3, 3), (3, -1), (1, 0), (-3, 0)])
def test_impossible_folds_are_refused_with_their_flags(folds: int, fold: int) -> None:
    with pytest.raises(InputError, match=f"--data.folds {folds} --data.fold {fold}: "):
        make_split(HUNDRED[:10], Recipe(folds=folds, fold=fold))


@pytest.mark.parametrize("pattern", [r"(plate\d)-well\d", r"plate\d"])
def test_a_regular_expression_groups_by_what_it_finds(pattern: str) -> None:
    ids = [f"plate{plate}-well{well}" for plate in range(4) for well in range(5)]
    sides = side_of(make_split(ids, Recipe(groups=pattern)))
    assert len(sides) == 20
    assert len({(sample[:6], side) for sample, side in sides.items()}) == 4


def test_an_image_without_a_group_is_one_of_its_own(tmp_path: Path) -> None:
    table = tmp_path / "groups.csv"
    table.write_text("image_id,group\nx1,x\nx2,x\nx3,x\n")
    ids = ["x1", "x2", "x3", "lone", "other"]
    for groups in (str(table), "^x"):
        splits = [make_split(ids, Recipe(groups=groups, folds=3, fold=fold)) for fold in range(3)]
        tests = sorted(split.sides["test"] for split in splits)
        assert tests == [["lone"], ["other"], ["x1", "x2", "x3"]]


def test_groups_that_group_nothing_are_refused_and_others_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ["plate1_a", "plate1_b", "plate2_a", "lone"]
    with pytest.raises(InputError, match=r"--data\.groups \^plat_: groups none of the images"):
        make_split(ids, Recipe(groups="^plat_"))
    monkeypatch.setattr(logging.getLogger("cellseg"), "propagate", True)
    make_split(ids, Recipe(groups="^plate."))
    assert "Images that are in no group of --data.groups are one each: " in caplog.text
    assert "lone" in caplog.text


def test_images_that_a_checkpoint_does_not_know_are_divided_too() -> None:
    known = {"train": {"1": "a", "2": "b"}, "val": {"3": "c"}}
    digests = {"a": "1", "c": "3", **{f"new{n}": f"n{n}" for n in range(5)}}
    assert len(split_in_force(digests, "fit", Recipe(), known, resumes=True).left_out) == 5
    more = split_in_force(digests, "fit", Recipe(), known)
    assert more.left_out == []
    assert sorted(side_of(more)) == sorted(digests)
    assert {side: [s for s in more.sides[side] if s in "abc"] for side in SIDES} == {
        "train": ["a"], "val": ["c"], "test": [],
    }  # fmt: skip
    assert {side: len(more.sides[side]) for side in SIDES} == {"train": 4, "val": 2, "test": 1}
    one = extended(Split("", {"train": ["a"], "val": ["c"], "test": []}, ["new"]), seed=0)
    assert one.sides["train"] == ["a", "new"]


def test_tiles_of_one_new_field_are_not_divided() -> None:
    by_field: dict[str, list[str]] = {}
    for sample, row in dsb2018().items():
        by_field.setdefault(row["field"], []).append(sample)
    tiles = max(by_field.values(), key=len)[:3]
    known = {"train": ["a", "b"], "val": ["c"], "test": []}
    assert extended(Split("", known, tiles), seed=0).sides["train"] == sorted(["a", "b", *tiles])


def test_images_of_a_known_field_join_it() -> None:
    field = {sample: row["field"] for sample, row in dsb2018().items()}
    digests = {sample: sample for sample in field}
    first = make_split([*field][::2], Recipe("random"))
    trained = {side: {s: s for s in first.sides[side]} for side in SIDES}
    more = split_in_force(digests, "fit", Recipe(), trained)
    assert sum(map(len, more.sides.values())) == len(field)
    on = [{field[sample] for sample in more.sides[side]} for side in SIDES]
    assert not (on[0] & on[1] or on[0] & on[2] or on[1] & on[2])
    assert all(set(first.sides[side]) <= set(more.sides[side]) for side in SIDES)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_decides_and_what_it_does_not_list_is_left_out(
    tmp_path: Path, encoding: str
) -> None:
    table = tmp_path / "split.csv"
    table.write_text("image_id,note,split\nä,x,val\nb,,train\nc,,test\ngone,,test\n", encoding)
    split = make_split(["b", "c", "new", "ä"], Recipe(split=str(table)))
    assert split.sides == {"train": ["b"], "val": ["ä"], "test": ["c"]}
    assert split.left_out == ["new"]
    assert str(table) in str(split)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_tables_and_patterns_name_images_in_whatever_form_of_unicode(
    form: str, tmp_path: Path
) -> None:
    ids = [f"Müller{number}" for number in range(3)]
    names = [unicodedata.normalize(form, name) for name in ids]
    table = tmp_path / "table.csv"
    rows = [f"{name},{side},{side}" for name, side in zip(names, SIDES, strict=True)]
    table.write_text("\n".join(["image_id,split,group", *rows]), encoding="utf-8")
    split = make_split(ids, Recipe(split=str(table)))
    assert split.sides == {side: [name] for side, name in zip(SIDES, ids, strict=True)}
    expected = dict(zip(ids, SIDES, strict=True))
    assert group_of(ids, str(table)) == expected
    assert group_of(ids, names[0][:-1]) == dict.fromkeys(ids, ids[0][:-1])


def test_a_split_says_its_sizes() -> None:
    assert str(make_split(HUNDRED, Recipe())).startswith("train 80, val 10, test 10 (random")


@pytest.mark.parametrize("content", ["image,split\na,train\n", "image_id;split\na;train\n"])
@pytest.mark.parametrize("flag", ["split", "groups"])
def test_a_table_without_the_columns_is_refused_with_its_flag(
    tmp_path: Path, flag: str, content: str
) -> None:
    table = tmp_path / "table.csv"
    table.write_text(content)
    column = {"split": "split", "groups": "group"}[flag]
    with pytest.raises(InputError, match=f"^--data.{flag} {table}: .*image_id and {column}$"):
        make_split(["a", "b"], Recipe(**{flag: str(table)}))


@pytest.mark.parametrize("flag", ["split", "groups"])
def test_a_table_that_cannot_be_read_is_refused_with_its_flag(tmp_path: Path, flag: str) -> None:
    (tmp_path / "binary.csv").write_bytes(b"image_id,split,group\n\xff\xfe\x00,a,b\n")
    for path in (tmp_path / "absent.csv", tmp_path / "binary.csv"):
        with pytest.raises(InputError, match=f"^--data.{flag} {path}: "):
            make_split(["a", "b"], Recipe(**{flag: str(path)}))


def test_a_split_that_names_no_image_is_refused_with_an_image(tmp_path: Path) -> None:
    table = tmp_path / "split.csv"
    table.write_text("image_id,split\na.png,train\nb.png,val\n")
    with pytest.raises(InputError, match=f"{table}: names none of the images; .* of one is a$"):
        make_split(["a", "b"], Recipe(split=str(table)))


def test_groups_that_a_table_divides_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("cellseg"), "propagate", True)
    table = tmp_path / "split.csv"
    table.write_text("image_id,split\na1,train\na2,train\nb1,train\nb2,val\nc1,test\n")
    make_split(["a1", "a2", "b1", "b2", "c1", "d1"], Recipe(split=str(table), groups="^."))
    assert "divides 1 groups of --data.groups, so the scores are too high: b" in caplog.text


def test_an_unknown_side_is_refused_with_the_table_and_the_image(tmp_path: Path) -> None:
    table = tmp_path / "split.csv"
    table.write_text("image_id,split\na,train\nb,training\n")
    with pytest.raises(InputError, match=f"{table}: 'training' of b is none of train, val, test"):
        make_split(["a", "b"], Recipe(split=str(table)))


def test_a_broken_regular_expression_is_refused_with_its_flag() -> None:
    with pytest.raises(InputError, match=r"^--data\.groups plate\(: .*regular expression"):
        make_split(["a", "b"], Recipe(groups="plate("))


def test_all_images_in_one_group_are_refused() -> None:
    with pytest.raises(InputError, match=r"^--data\.groups: all 100 images are in one group"):
        make_split(HUNDRED, Recipe(groups="^image"))


@pytest.mark.parametrize("options", [{"split": "random"}, {"folds": 5, "fold": 2}])
def test_known_images_divided_anew_keep_their_fields_together(options: dict[str, Any]) -> None:
    listed = dsb2018()
    side = side_of(make_split(list(listed), Recipe(**options)))
    pairs = {(listed[sample]["field"], at) for sample, at in side.items()}
    assert len(pairs) == len({row["field"] for row in listed.values()})


@pytest.mark.parametrize(
    ("stage", "asked", "trained", "flags", "expected"),
    [
        ("test", "random", "ab", {"own": True}, "all images"),
        ("test", "auto", None, {"labels": True}, "all images"),
        ("test", "random", None, {"labels": True}, "random"),
        ("fit", "auto", None, {"own": True, "labels": True}, "random"),
        ("fit", "random", "ab", {}, "random"),
        ("test", "auto", "ab", {}, "the checkpoint's split"),
        ("fit", "auto", "ab", {}, "random"),  # which leaves nothing to validate on
        ("fit", "auto", "ab", {"resumes": True}, "the checkpoint's split"),
        ("test", "auto", "z", {}, "all images: the checkpoint was trained on none of them"),
        ("fit", "auto", "z", {}, "random"),
        ("test", "auto", None, {}, "random"),
    ],
)
def test_which_split_is_in_force(
    stage: str, asked: str, trained: str | None, flags: dict[str, bool], expected: str
) -> None:
    before = trained and {"train": dict.fromkeys(trained, "an id")}
    images = {f"image {digest}": digest for digest in "ab"}
    split = split_in_force(images, stage, Recipe(asked), before or None, **flags)
    assert split.name.removesuffix(" 80/10/10 by group, seed 0") == expected


def test_labels_of_known_test_images_are_scored_by_the_projects_split() -> None:
    digests = {sample: sample for sample in dsb2018()}
    split = split_in_force(digests, "test", Recipe(), labels=True)
    assert split.sides == make_split(list(digests), Recipe()).sides


def test_the_labels_of_one_known_test_image_are_scored(tmp_path: Path) -> None:
    one = next(sample for sample, row in dsb2018().items() if row["split"] == "test")
    table = tmp_path / "split.csv"
    table.write_text(f"image_id,split\n{one},test\n")
    for recipe in (Recipe(), Recipe(split=str(table))):
        assert split_in_force({one: "1"}, "test", recipe, labels=True).sides["test"] == [one]
    with pytest.raises(InputError, match="1 annotated image is too few"):
        split_in_force({one: "1"}, "fit", Recipe())


def test_an_image_that_was_trained_on_is_not_tested_under_another_side() -> None:
    both = {"train": {"1": "a"}, "val": {}, "test": {"1": "a again", "2": "b"}}
    split = split_in_force({"x": "1", "y": "2"}, "test", Recipe(), both)
    assert split.sides == {"train": ["x"], "val": [], "test": ["y"]}


@pytest.mark.parametrize(("row", "said"), [("b", "b has no"), ("b,", "b has no"), ("a,y", "two")])
@pytest.mark.parametrize(("flag", "column"), [("split", "split"), ("groups", "group")])
def test_a_table_with_gaps_or_contradictions_is_refused(
    tmp_path: Path, flag: str, column: str, row: str, said: str
) -> None:
    table = tmp_path / "table.csv"
    table.write_text(f"image_id,{column}\na,x\n{row}\n")
    with pytest.raises(InputError, match=f"^--data.{flag} {table}: .*{said}"):
        make_split(["a", "b"], Recipe(**{flag: str(table)}))


def test_the_split_of_stardists_paper() -> None:
    listed = dsb2018()
    split = make_split(list(listed), Recipe("stardist"))
    side = side_of(split)
    assert sizes(split) == (401, 45, 49)
    assert all((at == "test") == (listed[s]["stardist"] == "test") for s, at in side.items())
    fields = [{listed[s]["field"] for s in split.sides[at]} for at in ("train", "val")]
    assert fields[0].isdisjoint(fields[1])
    assert len(split.left_out) == 169


def test_new_images_of_a_field_that_was_trained_on_join_training() -> None:
    fields: dict[str, list[str]] = {}
    for sample, row in dsb2018().items():
        fields.setdefault(row["field"], []).append(sample)
    first, second, new = next(ids for ids in fields.values() if len(ids) > 2)[:3]
    for side in ("val", "test"):
        sides = {"train": [first], "val": [], "test": []} | {side: [second]}
        assert new in extended(Split("", sides, [new]), seed=0).sides["train"]


@pytest.mark.parametrize("folder", ["", "dsb2018/train/"])
def test_known_images_are_known_in_whatever_folder_they_lie(folder: str) -> None:
    ids = [f"{folder}{sample}" for sample in dsb2018()]
    for split in ("auto", "stardist"):
        divided = make_split(ids, Recipe(split))
        bare = make_split(list(dsb2018()), Recipe(split))
        assert divided.sides == {
            side: [f"{folder}{sample}" for sample in samples]
            for side, samples in bare.sides.items()
        }
    groups = group_of(ids, None)
    assert [groups[sample] for sample in ids] == [row["field"] for row in dsb2018().values()]
