from __future__ import annotations

import csv
import errno
import os
import stat
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from cellseg.data.cache import read_sample
from cellseg.data.files import FileDataset, Reading
from cellseg.data.folders import Sample, Tree, find_samples, open_tree
from cellseg.data.listing import files_to_predict, output_stems
from cellseg.data.synthetic import generate
from cellseg.errors import InputError
from cellseg.predict.formats import write_labels
from cellseg.predict.pictures import write_overlay
from cellseg.scoring.predictions import find_predictions

DSB2018 = Path(__file__).resolve().parents[2] / "shared" / "data" / "dsb2018"

JUNK = ("__MACOSX/k1/images/._k1.png", "k1/images/._k1.png", ".DS_Store", "Thumbs.db", "notes.txt")


def as_folder(tmp_path: Path, names: list[str]) -> Path:
    root = tmp_path / "root"
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


def as_zip(tmp_path: Path, names: list[str]) -> Path:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("an empty folder")
        for name in names:
            archive.writestr(name, name)
    return path


def as_folder_with_zip(tmp_path: Path, names: list[str]) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    (root / "README.txt").write_text("see https://bbbc.broadinstitute.org/BBBC038")
    as_zip(tmp_path, names).rename(root / "STAGE1.ZIP")
    return root


STORED = pytest.mark.parametrize("store", [as_folder, as_zip, as_folder_with_zip])
Store = Callable[[Path, list[str]], Path]

LAYOUTS = {
    "one mask a nucleus": (
        [
            "k2/images/k2.png",
            "k2/masks/n1.png",
            "k1/images/k1.png",
            "k1/masks/n2.png",
            "k1/masks/n1.png",
        ],
        [
            Sample("k1", "k1/images/k1.png", ("k1/masks/n1.png", "k1/masks/n2.png"), whole=False),
            Sample("k2", "k2/images/k2.png", ("k2/masks/n1.png",), whole=False),
        ],
    ),
    "one mask a nucleus, below other folders": (
        ["data/stage1_train/k1/images/k1.png", "data/stage1_train/k1/masks/n1.png"],
        [
            Sample(
                "k1",
                "data/stage1_train/k1/images/k1.png",
                ("data/stage1_train/k1/masks/n1.png",),
                whole=False,
            )
        ],
    ),
    "images and masks with equal names": (
        ["images/a.png", "images/a.geojson", "images/b c.TIF", "masks/a.tif", "masks/b c.png"],
        [
            Sample("a", "images/a.png", ("masks/a.tif",), whole=True),
            Sample("b c", "images/b c.TIF", ("masks/b c.png",), whole=True),
        ],
    ),
    "images and masks in each of two folders": (
        ["day1/images/a.png", "day1/masks/a.png", "day2/images/a.png", "day2/masks/a.png"],
        [
            Sample("day1/a", "day1/images/a.png", ("day1/masks/a.png",), whole=True),
            Sample("day2/a", "day2/images/a.png", ("day2/masks/a.png",), whole=True),
        ],
    ),
    "labels beside the image": (
        [
            "a.ome.tif",
            "a.ome_labels.tif",
            "b.jpg",
            "b_masks.png",
            "b_overlay.png",
            "b_probs.tif",
            "deep/ü.png",
            "deep/ü.png_labels.tif",
        ],
        [
            Sample("a.ome", "a.ome.tif", ("a.ome_labels.tif",), whole=True),
            Sample("b", "b.jpg", ("b_masks.png",), whole=True),
            Sample("deep/ü", "deep/ü.png", ("deep/ü.png_labels.tif",), whole=True),
        ],
    ),
    "outlines beside the image": (
        ["a.png", "a.geojson", "b.tif", "b.roi", "c.png", "c_rois.ZIP"],
        [
            Sample("a", "a.png", ("a.geojson",), whole=True),
            Sample("b", "b.tif", ("b.roi",), whole=True),
            Sample("c", "c.png", ("c_rois.ZIP",), whole=True),
        ],
    ),
    "OME-TIFF beside others": (
        [*(f"{a}/{b}" for a in ("images", "masks") for b in ("a.tif", "a.ome.tif"))],
        [
            Sample("a", "images/a.tif", ("masks/a.tif",), whole=True),
            Sample("a.ome", "images/a.ome.tif", ("masks/a.ome.tif",), whole=True),
        ],
    ),
    "OME-TIFF": (
        [
            "a.tif",
            "a_labels.ome.tif",
            "b.ome.tif",
            "b_rois.zip",
            "c/images/d.ome.tif",
            "c/images/e.tif",
            "c/masks/d.tif",
            "c/masks/e.ome.tif",
        ],
        [
            Sample("a", "a.tif", ("a_labels.ome.tif",), whole=True),
            Sample("b.ome", "b.ome.tif", ("b_rois.zip",), whole=True),
            Sample("c/d.ome", "c/images/d.ome.tif", ("c/masks/d.tif",), whole=True),
            Sample("c/e", "c/images/e.tif", ("c/masks/e.ome.tif",), whole=True),
        ],
    ),
}


@STORED
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_found_however_it_is_stored(
    tmp_path: Path, layout: str, store: Store
) -> None:
    names, expected = LAYOUTS[layout]
    tree = open_tree(store(tmp_path, [*names, *JUNK]))
    samples, missing, _ = find_samples(tree)
    assert samples == expected
    assert missing == []
    source = tree.source(samples[0].image)
    content = source if isinstance(source, bytes) else source.read_bytes()
    assert content == samples[0].image.encode()


def test_masks_without_an_image_are_named(tmp_path: Path) -> None:
    used = ["a.png", "a_labels.tif", "p/images/a.png", "p/masks/a.png", "k/images/k.png"]
    used += ["k/masks/n1.png", "k/masks/n2.png"]
    # Of three images two are gone: what is left is not one image with a mask a nucleus.
    orphans = ["b_labels.tif", "c_rois.zip", "p/masks/b.png", "p/masks/c.png"]
    samples, missing, left = find_samples(open_tree(as_folder(tmp_path, [*used, *orphans])))
    assert left == orphans
    assert missing == []
    masks = {sample.id: sample.masks for sample in samples}
    assert masks["p/a"] == ("p/masks/a.png",)
    assert masks["k"] == ("k/masks/n1.png", "k/masks/n2.png")


@STORED
def test_images_without_a_mask_are_named(tmp_path: Path, store: Store) -> None:
    names = [
        *("k1/images/k1.png", "k1/masks/n1.png", "k2/images/k2.png"),
        *("p/images/a.png", "p/images/b.png", "p/masks/a.png"),
        *("q/images/a.png", "q/images/b.png", "q/masks/b.png"),  # not of a
        *("flat/a.tif", "flat/a_labels.tif", "flat/b.tif"),
    ]
    samples, missing, _ = find_samples(open_tree(store(tmp_path, names)))
    assert [sample.id for sample in samples] == ["flat/a", "k1", "p/a", "q/b"]
    assert sorted(missing) == [
        "flat/b.tif", "k2/images/k2.png", "p/images/b.png", "q/images/a.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "a_labels.tif", "a_masks.png"],
        ["a.png", "a_masks.tif", "a_masks.png"],
        ["images/a.png", "masks/a.tif", "masks/a.png"],
    ],
)
def test_an_image_with_two_masks_is_refused(tmp_path: Path, names: list[str]) -> None:
    image, *masks = names
    with pytest.raises(InputError, match="several masks") as caught:
        find_samples(open_tree(as_folder(tmp_path, names)))
    assert all(name in str(caught.value) for name in (image, *masks))


def test_two_images_with_one_mask_are_refused(tmp_path: Path) -> None:
    names = ["a.png", "a.tif", "a_labels.tif", "b.png", "b_labels.tif"]
    with pytest.raises(InputError, match=r"a_labels\.tif would be of a\.png and of a\.tif; keep"):
        find_samples(open_tree(as_folder(tmp_path, names)))
    names[2:3] = ["a.png_labels.tif", "a.tif_labels.tif"]
    samples, _, _ = find_samples(open_tree(as_folder(tmp_path / "whole", names)))
    assert [sample.id for sample in samples] == ["a.png", "a.tif", "b"]


def test_two_images_of_one_id_are_refused(tmp_path: Path) -> None:
    names = ["x/k/images/k.png", "x/k/masks/n.png", "y/k/images/k.png", "y/k/masks/n.png"]
    with pytest.raises(InputError, match="both 'k'") as caught:
        find_samples(open_tree(as_folder(tmp_path, names)))
    assert "x/k/images/k.png" in str(caught.value) and "y/k/images/k.png" in str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ["notes.txt"],
        ["a.png", "b.png"],
        ["a_labels.tif", "masks/b.png"],
        ["k1/images/k1.png", "k1/masks/notes.txt"],
        ["images/k1.png", "masks/n1.png", "masks/n2.png"],  # in no folder that would be its id
        ["a.zip", "b.zip"],
    ],
)
@STORED
def test_where_no_image_has_a_mask_the_layouts_are_named(
    tmp_path: Path, names: list[str], store: Store
) -> None:
    root = store(tmp_path, names)
    with pytest.raises(InputError) as caught:
        find_samples(open_tree(root))
    message = str(caught.value)
    assert str(root) in message
    assert all(part in message for part in ("images/", "masks/", "_labels.tif", "_masks"))


@pytest.mark.skipif(not DSB2018.is_dir(), reason=f"no DSB2018 images in {DSB2018}")
def test_the_real_archive_has_its_664_images_with_all_their_masks() -> None:
    with (DSB2018 / "split.csv").open() as lines:
        nuclei = {row["image_id"]: int(row["n_nuclei"]) for row in csv.DictReader(lines)}
    samples, missing, _ = find_samples(open_tree(DSB2018 / "stage1_train.zip"))
    assert len(samples) == 664
    assert {sample.id: len(sample.masks) for sample in samples} == nuclei
    assert missing == []


@pytest.mark.parametrize(
    ("name", "said"),
    [("absent", "no such"), ("absent.zip", "no such"), ("notes.zip", "not a zip archive")],
)
def test_a_root_that_is_neither_folder_nor_archive_is_refused(
    name: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "notes.zip").write_text("no archive")
    with pytest.raises(InputError, match=f"{tmp_path / name}: {said}"):
        open_tree(tmp_path / name)


def test_an_archive_of_windows_powershell_is_read_everywhere(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("top\\images\\", "top\\images\\a.png", "top\\masks\\a.png"):
            entry = zipfile.ZipInfo(name)
            entry.filename = name  # on Windows it has slashes now
            archive.writestr(entry, name)
    tree = open_tree(tmp_path / "a.zip")
    assert [sample.image for sample in find_samples(tree)[0]] == ["top/images/a.png"]
    assert tree.source("top/masks/a.png") == b"top\\masks\\a.png"


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    path = as_folder_with_zip(tmp_path, ["k1/images/k1.png", "k1/masks/n1.png"]) / "STAGE1.ZIP"
    path.write_bytes(path.read_bytes()[:-40])
    for root in (path, path.parent):
        with pytest.raises(InputError, match=f"{path}: not a zip archive, or a broken-off one"):
            open_tree(root)


def test_an_archive_of_other_content_is_another_whatever_its_size(tmp_path: Path) -> None:
    prints = set()
    for content in (b"one", b"two"):
        with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
            archive.writestr("a.png", content)
        prints.add(open_tree(tmp_path / "data.zip").fingerprint(["a.png"]))
    assert len(prints) == 2


def test_a_damaged_member_is_named(tmp_path: Path) -> None:
    path = as_zip(tmp_path, ["k1/images/k1.png", "k1/masks/n1.png"])
    content = path.read_bytes()
    where = content.index(b"k1/images/k1.pngk1/images/k1.png") + len("k1/images/k1.png")
    path.write_bytes(content[:where] + b"X" + content[where + 1 :])
    tree = open_tree(path)
    assert tree.source("k1/masks/n1.png") == b"k1/masks/n1.png"
    with pytest.raises(InputError, match=rf"{path}: k1/images/k1\.png is damaged"):
        tree.source("k1/images/k1.png")


@pytest.mark.parametrize(("size", "refused"), [(5_000_000, True), (900_000, False)])
def test_fault_34_a_decompression_bomb_is_refused_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, refused: bool
) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("k1/images/k1.png", bytes(size))
    monkeypatch.setattr(zipfile.ZipFile, "open", None)  # nothing may be decompressed
    if refused:
        with pytest.raises(InputError, match=r"k1/images/k1\.png claims 5,000,000 bytes; refused"):
            open_tree(path)
    else:
        assert open_tree(path).names == ["k1/images/k1.png"]


@pytest.mark.parametrize("member", ["../evil.png", "a/../../b.png", "/absolute.png", "link.png"])
def test_fault_34_an_archive_with_a_way_out_of_it_is_refused(member: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        entry = zipfile.ZipInfo(member)
        entry.external_attr = ((stat.S_IFLNK if "link" in member else stat.S_IFREG) | 0o777) << 16
        archive.writestr(entry, "/etc/hostname")
    with pytest.raises(InputError, match=rf"{member} leads out of the archive; refused"):
        open_tree(tmp_path / "data.zip")


def test_files_to_predict_are_found_below_the_folder_in_order(tmp_path: Path) -> None:
    images = ["A.TIF", "Zellen ü/b c.JPeG", "a.png", "z/y/x/deep.tiff"]
    others = [".DS_Store", "._a.png", "Thumbs.db", "notes.txt", ".hidden/a.png", "z/._deep.tiff"]
    root = as_folder(tmp_path, [*images, *others])
    base, found = files_to_predict(root, [], [])
    assert (base, list(found)) == (root, images)


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*.tif"], [], ["a.tif", "deep/b.tif"]),
        (["*.tif"], ["deep/*"], ["a.tif"]),
        ([], ["b.*"], ["a.png", "a.tif"]),
        (["deep/*"], [], ["deep/b.png", "deep/b.tif"]),
        (["a.*", "b.png"], ["*.tif"], ["a.png", "deep/b.png"]),
    ],
)
def test_patterns_choose_by_name_or_path(
    tmp_path: Path, include: list[str], exclude: list[str], expected: list[str]
) -> None:
    root = as_folder(tmp_path, ["a.png", "a.tif", "deep/b.png", "deep/b.tif"])
    assert list(files_to_predict(root, include, exclude)[1]) == expected


def test_results_are_named_as_in_a_run_over_all_files(tmp_path: Path) -> None:
    root = as_folder(tmp_path, ["a.png", "a.tif", "b.png"])
    everything = files_to_predict(root, [], [])[1]
    assert everything == {"a.png": "a.png", "a.tif": "a.tif", "b.png": "b"}
    assert files_to_predict(root, ["a.*"], ["*.tif"])[1] == {"a.png": "a.png"}


def test_one_image_is_predicted_alone(tmp_path: Path) -> None:
    root = as_folder(tmp_path, ["a.PNG", "b.png"])
    assert files_to_predict(root / "a.PNG", [], []) == (root, {"a.PNG": "a"})


def test_a_list_names_images_relative_to_itself_and_keeps_missing_ones(tmp_path: Path) -> None:
    root = as_folder(tmp_path, ["day 1/ü.png", "day2/b.tif", "day2/unlisted.tif"])
    folder = root / "lists"
    folder.mkdir()
    lines = ["../day2/b.tif", "", f"{root}/day 1/ü.png", "../day2/gone.tif", "../day2/b.tif"]
    for ending, bom in (("\n", ""), ("\r\n", "\ufeff")):
        (folder / "batch.txt").write_bytes((bom + ending.join(lines)).encode())
        base, names = files_to_predict(folder / "batch.txt", [], [])
        assert base == root
        assert list(names) == ["day 1/ü.png", "day2/b.tif", "day2/gone.tif"]


def test_a_list_may_name_images_that_begin_as_comments_do(tmp_path: Path) -> None:
    root = as_folder(tmp_path, ["#1.tif", "b.tif"])
    (root / "list.txt").write_text(f"# of Monday{'!' * 300}\n#1.tif\nb.tif\n")
    assert list(files_to_predict(root / "list.txt", [], [])[1]) == ["#1.tif", "b.tif"]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\x80\x02binary\xff"])
def test_a_file_that_lists_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^--data.predict_dir {path}: "):
        files_to_predict(path, [], [])


def test_a_file_too_large_for_a_list_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "slide.lif").open("wb") as file:
        file.truncate(2**40)  # takes no place on the disk
    with pytest.raises(InputError, match="neither an image that is read"):
        files_to_predict(tmp_path / "slide.lif", [], [])


def test_a_folder_that_cannot_be_listed_is_tried_as_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = as_folder(tmp_path, ["day1/a.png", "day2/b.png"])
    listed = os.scandir

    def scandir(folder: str) -> Any:
        if folder.endswith("day1"):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return listed(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    assert list(files_to_predict(root, [], [])[1]) == ["day1", "day2/b.png"]
    assert f"{root / 'day1'}: left out" in caplog.text
    monkeypatch.undo()
    tried = FileDataset(root, [("day1", "day1")], Reading(percentiles=(1, 99)))[0, False]
    assert tried["error"].startswith("day1: ")


def test_linked_folders_are_visited_once_and_loops_end(tmp_path: Path) -> None:
    root = as_folder(tmp_path, ["day1/a.png", "z.png"])
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "b.png").touch()
    (root / "linked").symlink_to(outside)
    (root / "linked again").symlink_to(outside)
    (root / "day1" / "loop").symlink_to(root)
    (outside / "self").symlink_to(outside)
    names = files_to_predict(root, [], [])[1]
    assert len(names) == 3
    assert {Path(name).name for name in names} == {"a.png", "b.png", "z.png"}


def test_results_inside_the_input_folder_are_not_input(tmp_path: Path) -> None:
    root = as_folder(
        tmp_path, ["a.png", "out/a.png", "out/deep/b.png", "output.png", "outer/c.png"]
    )
    expected = ["a.png", "outer/c.png", "output.png"]
    assert list(files_to_predict(root, [], [], root / "out")[1]) == expected
    linked = tmp_path / "alias"
    linked.symlink_to(root)
    assert list(files_to_predict(linked, [], [], root / "out")[1]) == expected
    for elsewhere in (root, tmp_path, tmp_path / "new"):
        assert len(files_to_predict(root, [], [], elsewhere)[1]) == 5


def test_own_results_are_known_by_their_tag_and_foreign_files_are_kept(tmp_path: Path) -> None:
    grey = np.full((9, 9), 7, np.uint8)
    for name in ("a.tif", "theirs_labels.tif"):
        tifffile.imwrite(tmp_path / name, grey)
    tifffile.imwrite(tmp_path / "untagged_labels.tif", grey, software=False)
    Image.fromarray(grey).save(tmp_path / "their_overlay.png")
    (tmp_path / "damaged_labels.tif").write_text("no image")
    foreign = sorted(path.name for path in tmp_path.iterdir())
    write_labels(tmp_path / "a_labels.tif", grey.astype(np.uint16))
    write_overlay(tmp_path / "a_overlay.png", np.zeros((9, 9, 3), np.uint8))
    assert list(files_to_predict(tmp_path, [], [])[1]) == foreign


@pytest.mark.parametrize("names", [[], ["notes.txt", ".DS_Store", "._a.tif", "Thumbs.db"]])
def test_a_folder_without_images_is_refused(tmp_path: Path, names: list[str]) -> None:
    root = as_folder(tmp_path, names)
    root.mkdir(exist_ok=True)
    with pytest.raises(InputError, match=f"^--data.predict_dir {root}: no image found") as caught:
        files_to_predict(root, [], [])
    assert all(suffix in str(caught.value) for suffix in (".png", ".jpg", ".tif"))


def test_patterns_that_leave_nothing_are_named(tmp_path: Path) -> None:
    root = as_folder(tmp_path, ["a.png"])
    with pytest.raises(InputError, match=r"including \*\.tif, excluding b\*"):
        files_to_predict(root, ["*.tif"], ["b*"])


def test_an_absent_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^--data.predict_dir {tmp_path / 'gone'}: no such"):
        files_to_predict(tmp_path / "gone", [], [])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.png", "b/a.png"], ["a", "b/a"]),
        (["a.ome.tif"], ["a.ome"]),
        (["a.png", "a.tif", "b.png"], ["a.png", "a.tif", "b"]),
        (["A.png", "a.tif"], ["A.png", "a.tif"]),
        (["A/x.png", "a/X.tif"], ["A/x.png", "a/X.tif"]),
        (["a", "a.png"], ["a", "a.png"]),
    ],
)
def test_results_are_named_after_the_stem_where_that_is_unique(
    names: list[str], expected: list[str]
) -> None:
    assert [*output_stems(names).values()] == expected


def test_no_two_files_ever_share_the_name_of_their_results() -> None:
    assert len(set(output_stems(["a.png", "a.tif", "a.png.tif"]).values())) == 3
    rng = np.random.default_rng(0)
    parts = ["a", "A", "b", ".png", ".tif", "/"]
    for _ in range(500):
        words = ["".join(rng.choice(parts, rng.integers(1, 5))) for _ in range(8)]
        paths = [str(PurePosixPath(f"x{word}x.png")) for word in words]
        paths += [path.removesuffix(".png") + ".tif" for path in paths[::2]]
        # Names that differ in case alone do not exist on the file systems where that matters.
        names = list({path.lower(): path for path in paths}.values())
        stems = output_stems(names).values()
        assert len({stem.lower() for stem in stems}) == len(names)


def test_a_tree_has_the_files_of_its_folder_by_relative_name(tmp_path: Path) -> None:
    names = ["a/b.png", "c.txt"]
    assert Tree(as_folder(tmp_path, names)).names == names


@pytest.mark.parametrize("kind", ["0/1", "0/255", "labels", "16 bit", "empty", "overlapping"])
def test_fault_24_masks_of_all_kinds_give_the_same_nuclei(kind: str, tmp_path: Path) -> None:

    truth = np.zeros((20, 30), np.uint8)
    truth[2:8, 2:9], truth[10:18, 12:25] = 1, 2
    folder = tmp_path / "a" if kind == "overlapping" else tmp_path
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    Image.fromarray(truth * 90).save(folder / "images" / "a.png")
    masks = {
        "0/1": (truth > 0).astype(np.uint8),
        "0/255": (truth > 0).astype(np.uint8) * 255,
        "labels": truth * 7,
        "16 bit": truth.astype(np.uint16) * 700,
        "empty": truth * 0,
    }
    if kind == "overlapping":
        for number in (1, 2):
            mask = truth == number
            mask[2:4, 2:9] = True  # the second also claims pixels of the first
            Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    else:
        Image.fromarray(masks[kind]).save(folder / "masks" / "a.png")
    tree = open_tree(tmp_path)
    (sample,), missing, _ = find_samples(tree)
    labels = read_sample(tree, sample)[1]
    assert missing == []
    np.testing.assert_array_equal(labels, truth * (kind != "empty"))


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.tif").symlink_to(tmp_path / "gone.tif")
    with pytest.raises(InputError, match=r"a\.tif: cannot be read: No such file"):
        open_tree(tmp_path).fingerprint(["a.tif"])


def test_a_prediction_is_never_taken_for_another_image_of_the_name(tmp_path: Path) -> None:
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "a_labels.tif").touch()
    (tmp_path / "b_labels.tif").touch()
    found = find_predictions(tmp_path, ["x/a", "y/a", "z/b"])
    assert found == {"y/a": tmp_path / "y" / "a_labels.tif", "z/b": tmp_path / "b_labels.tif"}


@pytest.mark.parametrize("mask", ["masks/a.tif", "masks/a_mask.tif", "labels/a.tif"])
def test_one_image_beside_its_label_image_is_no_nucleus(mask: str, tmp_path: Path) -> None:
    image, labels = generate(2, size=64)
    folder = tmp_path / "plate"
    for name in ("images/a.png", mask):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / "images" / "a.png")
    Image.fromarray(labels.astype(np.uint16)).save(folder / mask)
    tree = open_tree(tmp_path)
    (sample,), missing, orphans = find_samples(tree)
    assert (sample.id, missing, orphans) == ("plate/a", [], [])
    assert read_sample(tree, sample)[1].max() == labels.max() > 1


def test_a_folder_named_images_may_hold_the_labels_too(tmp_path: Path) -> None:
    names = ["images/a.tif", "images/a_labels.tif", "labels/b.tif", "labels/b_masks.png"]
    samples, missing, left = find_samples(open_tree(as_folder(tmp_path / "one", names[:2])))
    assert [(sample.image, sample.masks) for sample in samples] == [(names[0], (names[1],))]
    assert (missing, left) == ([], [])
    samples, missing, left = find_samples(open_tree(as_folder(tmp_path / "two", names[2:])))
    assert [(sample.image, sample.masks) for sample in samples] == [(names[2], (names[3],))]
    assert (missing, left) == ([], [])


def test_predictions_of_plates_with_equal_names_are_told_apart(tmp_path: Path) -> None:
    names = [f"p{plate}/images/a_labels.tif" for plate in (1, 2)]
    folder = as_folder(tmp_path, names)
    found = find_predictions(folder, ["p1/a", "p2/a"])
    assert found == {f"p{plate}/a": folder / name for plate, name in enumerate(names, start=1)}
    # Where an image is alone in its folder, that is its id.
    assert find_predictions(folder, ["p1", "p2"]) == {
        f"p{plate}": folder / name for plate, name in enumerate(names, start=1)
    }


def test_predictions_below_the_images_are_not_the_images(tmp_path: Path) -> None:
    folder = as_folder(tmp_path, ["images/a.png", "masks/a.png", "results/a_labels.tif"])
    assert find_predictions(folder, ["a"]) == {"a": folder / "results/a_labels.tif"}


def test_predictions_of_equal_names_lie_at_different_depths(tmp_path: Path) -> None:
    folder = as_folder(tmp_path, ["a_labels.tif", "day2/a_labels.tif"])
    assert find_predictions(folder, ["a", "day2/a"]) == {
        "a": folder / "a_labels.tif",
        "day2/a": folder / "day2/a_labels.tif",
    }


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["p/B02_s1_w1.tif", "p/B02_s1_w2.TIF", "p/B02_s1_w10_thumb.tif"], "_w1, _w2 alone"),
        (["a_ch00.tif", "a_ch01.tif"], "_ch00, _ch01 alone, as of channels"),
        (["a_w1.tif", "b_w2.tif"], ""),  # of two images
        (["a_1.tif", "a_2.tif", "new_cells.tif"], ""),
    ],
)
def test_channels_in_files_of_their_own_are_told_of(
    names: list[str], told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = as_folder(tmp_path, names)
    files_to_predict(folder, [], [])
    assert told in caplog.text
    assert bool(told) == ("channels in files" in caplog.text)


def test_patterns_do_not_mind_the_case(tmp_path: Path) -> None:
    folder = as_folder(tmp_path, ["p/B02_w1.TIF", "p/B02_w2.TIF"])
    assert list(files_to_predict(folder, ["*_W1*.tif"], [])[1]) == ["p/B02_w1.TIF"]


def test_litter_of_macos_is_no_file(tmp_path: Path) -> None:
    names = ["a.png", "a_rois.zip", "._a_rois.zip", "._a.png"]
    tree = open_tree(as_folder(tmp_path, names))
    assert find_samples(tree) == ([Sample("a", "a.png", ("a_rois.zip",), whole=True)], [], [])


def test_predictions_and_labels_as_ome_tiff_are_known(tmp_path: Path) -> None:
    names = ["a.ome.tif", "b_labels.ome.tif", "c.ome_labels.tif", "d_labels.tif"]
    folder = as_folder(tmp_path, names)
    ids = ["a.ome", "b", "c.ome", "d.ome"]
    found = find_predictions(folder, ids[1:])
    assert found == {each: folder / name for each, name in zip(ids[1:], names[1:], strict=True)}
    assert find_predictions(folder, ids[:1]) == {"a.ome": folder / "a.ome.tif"}
    # Both may be there, each with its own.
    both = ["e.ome_labels.tif", "e_labels.tif"]
    other = as_folder(tmp_path / "both", both)
    expected = {each: other / name for each, name in zip(("e.ome", "e"), both, strict=True)}
    assert find_predictions(other, ["e", "e.ome"]) == expected
    # Nor are they images to predict.
    for image in ("b.tif", "d.ome.tif"):
        (folder / image).write_bytes(b"")
    left = ["a.ome.tif", "b.tif", "c.ome_labels.tif", "d.ome.tif"]
    assert list(files_to_predict(folder, [], [])[1]) == left


@pytest.mark.parametrize(("form", "other"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_pair_in_whatever_form_of_unicode(form: str, other: str, tmp_path: Path) -> None:
    def named(*names: str, form: str = form) -> list[str]:
        return [unicodedata.normalize(form, name) for name in names]

    images = named("Müller.tif", "b/é.ome.tif", "c/images/ö.png")
    masks = named("Müller_labels.tif", "b/é_rois.zip", "c/masks/ö.png", form=other)
    folder = as_folder(tmp_path, [*images, *masks])
    samples, missing, orphans = find_samples(open_tree(folder))
    assert ({s.image: s.masks for s in samples}, missing, orphans) == (
        {image: (mask,) for image, mask in zip(images, masks, strict=True)},
        [],
        [],
    )
    ids = named("Müller", "b/é.ome", "c/ö", form="NFC")
    assert [sample.id for sample in samples] == ids
    assert list(files_to_predict(folder, [], [])[1]) == sorted(images)
    assert list(files_to_predict(folder, named("mü*", form=other), [])[1]) == images[:1]
    # Two files that a Mac takes for one name have results of two names.
    (one,), (two,) = named("é.png"), named("é.tif", form=other)
    assert output_stems([one, two]) == {one: one, two: two}
    results = named("Müller_labels.tif", "é_labels.tif", form=other)
    found = find_predictions(as_folder(tmp_path / "results", results), ids)
    assert [path.name for path in found.values()] == results


def test_folders_of_images_and_masks_are_known_in_whatever_case(tmp_path: Path) -> None:
    names = ["p/Images/a.png", "p/Images/b.png", "p/Masks/a.png", "p/LABELS/b.png"]
    folder = as_folder(tmp_path, names)
    samples, missing, left = find_samples(open_tree(folder))
    assert [(sample.id, sample.masks) for sample in samples] == [
        ("p/a", (names[2],)),
        ("p/b", (names[3],)),
    ]
    assert missing == left == []
    assert list(files_to_predict(folder, [], [])[1]) == names[:2]
    results = as_folder(tmp_path / "of", [f"{name[:-4]}_labels.tif" for name in names[:2]])
    assert list(find_predictions(results, ["p/a", "p/b"])) == ["p/a", "p/b"]
