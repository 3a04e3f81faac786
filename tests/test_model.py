"""The model that comes with the package, and how a model is started from, named and loaded."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from cellseg import checkpoint, load
from cellseg.checkpoint import resolve
from cellseg.data.synthetic import generate
from cellseg.errors import InputError
from cellseg.release import main as release_main
from cellseg.release import release
from cellseg.training import tuning
from cellseg.training.tuning import mix
from conftest import SMALL, cellseg, find_checkpoint

Fails = Callable[..., str]
SHIPPED = checkpoint.SHIPPED / "nuclei-1.safetensors"


@pytest.fixture(scope="module")
def released(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("released") / "small.safetensors"
    release(find_checkpoint(trained, "best"), target, {"name": "small"})
    return target


def test_a_released_model_says_what_its_checkpoint_said(trained: Path, released: Path) -> None:
    before = checkpoint.read(find_checkpoint(trained, "best"))
    after = checkpoint.read(released)
    assert after.settings == before.settings
    assert after.split == before.split
    assert after.weights.keys() == before.weights.keys()
    for name, value in before.weights.items():
        torch.testing.assert_close(after.weights[name], value.float(), rtol=1e-3, atol=1e-6)
    assert released.stat().st_size < 0.6 * 4 * sum(v.numel() for v in before.weights.values())


def test_a_damaged_released_model_is_refused(released: Path, tmp_path: Path) -> None:
    for name in (released.name, "small.json"):
        (tmp_path / name).write_bytes((released.parent / name).read_bytes())
    copy = tmp_path / released.name
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    with pytest.raises(InputError, match="sha256"):
        checkpoint.read(copy)
    for text in ("{}", "[]", "3"):
        (tmp_path / "small.json").write_text(text)
        with pytest.raises(InputError, match="no released model, or a damaged one"):
            checkpoint.read(copy)


def test_what_cannot_be_released_is_one_line(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = str(find_checkpoint(trained, "best"))
    target = str(tmp_path / "a.safetensors")
    for args, message in (
        (["none.ckpt", target], "none.ckpt: no such file"),
        ([best, str(tmp_path / "a.pt")], "a.pt: a released model ends in .safetensors"),
        ([best, target, "CC0"], "CC0: a fact is KEY=VALUE"),
    ):
        assert release_main(args) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert release_main([best, target, "licence=CC0"]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["licence"] == "CC0"


def test_the_shipped_model_fits_into_the_wheel_and_has_a_card() -> None:
    assert sum(path.stat().st_size for path in checkpoint.SHIPPED.iterdir()) < 16e6
    facts = json.loads(SHIPPED.with_suffix(".json").read_text())
    assert facts["name"] == "nuclei-1"
    card = SHIPPED.with_suffix(".md").read_text()
    assert facts["sha256"] in card
    for word in ("CC0", "split", "cellseg fit", "crops", "Known failures", "histology"):
        assert word in card


def test_the_shipped_model_was_trained_on_the_train_side_only() -> None:
    from cellseg.data.groups import dsb2018

    split = checkpoint.read(SHIPPED).split
    assert split is not None
    for side, images in split.items():
        assert {dsb2018()[name]["split"] for name in images.values()} == {side}
    assert [len(split[side]) for side in ("train", "val", "test")] == [529, 65, 70]


def test_predict_without_a_checkpoint_uses_the_shipped_model_and_names_it(
    nuclei: Path, tmp_path: Path
) -> None:
    # In an empty folder, as a user who has just installed it.
    (tmp_path / "here").mkdir()
    args = ("--data.predict_dir", nuclei / "images", "--output.dir", tmp_path / "one")
    done = subprocess.run(
        [sys.executable, "-m", "cellseg", "predict", *map(str, args)],
        capture_output=True, text=True, check=False, cwd=tmp_path / "here",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "nuclei-1" in done.stderr
    assert list((tmp_path / "here").iterdir()) == []
    run = json.loads((tmp_path / "one" / "run.json").read_text())
    assert run["model"] == "nuclei-1"
    assert run["model_sha256"] == json.loads(SHIPPED.with_suffix(".json").read_text())["sha256"]
    named = ("--ckpt_path", "nuclei-1", "--data.predict_dir", nuclei / "images")
    named = (*named, "--output.dir", tmp_path / "two")
    assert cellseg("predict", *named) == 0
    # Also where Python calls, whose own arguments are others.
    run = json.loads((tmp_path / "two" / "run.json").read_text())
    assert run["command"] == shlex.join(["cellseg", "predict", *map(str, named)])
    for path in (tmp_path / "one").glob("*_labels.tif"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize("command", ["validate", "test"])
def test_scoring_without_a_checkpoint_scores_the_shipped_model(
    command: str, nuclei: Path, tmp_path: Path
) -> None:
    args = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path)
    assert cellseg(command, *args, "--data.num_workers", 0) == 0
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["model"] == "nuclei-1"
    assert report["images"] == 12  # it was trained on none of them


def test_a_flag_that_contradicts_the_shipped_model_is_refused(nuclei: Path, fails: Fails) -> None:
    line = fails("predict", "--data.predict_dir", nuclei / "images", "--model.base_channels", 4)
    assert "base_channels 4" in line
    assert "nuclei-1" in line


def test_decode_flags_win_over_the_models(nuclei: Path, tmp_path: Path) -> None:
    args = ("predict", "--data.predict_dir", nuclei / "images", "--output.dir", tmp_path)
    assert cellseg(*args, "--decode.min_area", 10**6) == 0
    for path in tmp_path.glob("*_labels.tif"):
        assert not tifffile.imread(path).any()


def test_a_fit_starts_from_weights_and_does_not_ask_for_them_again(
    released: Path, trained: Path, nuclei: Path, tmp_path: Path
) -> None:
    local = tmp_path / "start.safetensors"
    for source in (released, released.with_suffix(".json")):
        local.with_suffix(source.suffix).write_bytes(source.read_bytes())
    run = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path / "run", *SMALL[4:])
    steps = ("--trainer.max_epochs", 1, "--model.lr", 1e-12)
    # Its architecture needs no flag, and a step of nothing leaves the weights as they were.
    assert cellseg("fit", "--model.weights", local, *run, *steps) == 0
    ckpt = find_checkpoint(tmp_path / "run")
    before, after = checkpoint.read(released), checkpoint.read(ckpt)
    kernel = "net.head.weight"
    torch.testing.assert_close(after.weights[kernel], before.weights[kernel], rtol=1e-5, atol=1e-6)
    assert "model.weights" not in after.settings
    local.unlink()
    assert cellseg("test", "--ckpt_path", ckpt, *run[:4], "--data.num_workers", 0) == 0
    assert cellseg("fit", "--ckpt_path", ckpt, *run, "--trainer.max_epochs", 2) == 0


@pytest.mark.parametrize("share", [1.0, 0.75, 0.0])
def test_what_was_learnt_counts_as_far_as_validation_likes_it(
    share: float,
    trained: Path,
    nuclei: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    start = find_checkpoint(trained, "best")
    scores = iter([0.5 if each == share else 0.4 for each in (1.0, *tuning.SHARES)])
    monkeypatch.setattr(tuning, "mean_ap", lambda *_: next(scores, 0.0))
    run = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path, *SMALL[6:])
    flags = ("--model.weights", start, "--model.lr", 0.01, "--model.warmup_steps", 0)
    assert cellseg("fit", *flags, *run, "--trainer.max_epochs", 1) == 0
    assert f"0% 0.{5 if share == 0 else 4}00; {share:.0%} is kept" in "".join(capfd.readouterr())
    before, after, learnt = (
        torch.load(path, weights_only=True)["state_dict"]
        for path in (start, find_checkpoint(tmp_path, "best"), find_checkpoint(tmp_path))
    )
    kernel = "net.head.weight"
    assert not torch.equal(before[kernel], learnt[kernel])
    torch.testing.assert_close(after[kernel], before[kernel].lerp(learnt[kernel], share))


def test_weights_are_mixed_in_proportion_and_counters_are_not() -> None:
    start = {"weight": torch.tensor([0.0, 4.0]), "steps": torch.tensor(3)}
    learnt = {"weight": torch.tensor([8.0, 0.0]), "steps": torch.tensor(7)}
    mixed = mix(start, learnt, 0.25)
    assert mixed["weight"].tolist() == [2, 3]
    assert int(mixed["steps"]) == 7
    half = {name: value.half() if name == "weight" else value for name, value in learnt.items()}
    mixed = mix(start, half, 0.25)  # as with --trainer.precision 16-true
    assert mixed["weight"].tolist() == [2, 3]
    assert mixed["weight"].dtype == torch.float16


def test_best_and_last_are_found_below_a_folder(trained: Path, tmp_path: Path) -> None:
    for name in ("best", "last"):
        assert checkpoint.resolve(name, str(trained)) == find_checkpoint(trained, name)
        with pytest.raises(InputError, match=f"--ckpt_path {name}: no such checkpoint"):
            checkpoint.resolve(name, str(tmp_path))


def test_of_a_folder_the_checkpoint_in_it_is_named(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"its newest best .* {find_checkpoint(trained, 'best')}"):
        checkpoint.resolve(str(trained))
    with pytest.raises(InputError, match="a folder; no checkpoint is below it"):
        checkpoint.resolve(str(tmp_path))


def test_a_fit_from_a_checkpoints_weights_has_a_schedule_of_its_own(
    trained: Path, nuclei: Path, tmp_path: Path
) -> None:
    ckpt = find_checkpoint(trained, "best")
    run = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path, *SMALL[6:])
    assert cellseg("fit", "--model.weights", ckpt, *run, "--trainer.max_epochs", 1) == 0
    content = torch.load(find_checkpoint(tmp_path), weights_only=True)
    assert content["global_step"] == 4
    assert content["hyper_parameters"]["base_channels"] == 4
    assert content["hyper_parameters"]["warmup_steps"] == 100


def test_a_run_that_goes_on_scores_at_the_levels_that_it_began_with(
    trained: Path, nuclei: Path, tmp_path: Path
) -> None:
    levels = {"threshold": 0.35, "marker": 0.1, "min_area": 3}
    content = torch.load(find_checkpoint(trained), weights_only=True)
    torch.save({**content, "decoding": content["decoding"] | levels}, tmp_path / "start.ckpt")
    run = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path / "run", *SMALL[6:])
    start = ("--model.weights", tmp_path / "start.ckpt", "--trainer.max_epochs", 1)
    assert cellseg("fit", *start, *run) == 0
    assert cellseg("fit", "--ckpt_path", "last", *run, "--trainer.max_epochs", 2) == 0
    content = torch.load(find_checkpoint(tmp_path / "run"), weights_only=True)
    assert content["scored_with"].items() >= levels.items()


def test_weights_that_are_not_there_or_do_not_fit_are_refused(
    released: Path, nuclei: Path, fails: Fails
) -> None:
    line = fails("fit", "--model.weights", "nuclei-9", "--data.root", nuclei)
    assert "nuclei-9" in line
    assert "nuclei-1" in line
    line = fails(
        "fit", "--model.weights", released, "--model.base_channels", 8, "--data.root", nuclei
    )
    assert "base_channels 8" in line


def test_in_python_the_labels_are_those_of_the_command(trained: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    picture = generate(3, size=90)[0]
    Image.fromarray(picture).save(images / "a.png")
    Image.fromarray(picture[..., 1]).save(images / "grey.png")
    blue = np.stack([0 * picture[..., 1], 0 * picture[..., 1], picture[..., 1]], axis=2)
    Image.fromarray(blue).save(images / "blue.png")
    Image.fromarray(picture[..., 1].astype(np.uint16) * 257).save(images / "deep.png")
    for name in ("nuclei-1", find_checkpoint(trained, "best")):
        args = ("--data.predict_dir", images, "--ckpt_path", name)
        assert cellseg("predict", *args, "--output.dir", tmp_path / "out") == 0
        model = load(str(name))
        for array, stem in (
            (picture, "a"),
            (picture[..., 1], "grey"),
            (blue, "blue"),
            (picture[..., 1].astype(np.uint16) * 257, "deep"),
        ):
            written = tifffile.imread(tmp_path / "out" / f"{stem}_labels.tif")
            np.testing.assert_array_equal(model.predict(array), written)
        np.testing.assert_array_equal(model.predict(blue), model.predict(picture[..., 1]))


def test_a_model_goes_to_another_process() -> None:
    image = generate(3, size=128)[0]
    model = load("nuclei-1")
    model.task.decoding = replace(model.task.decoding, min_area=60)
    other = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(other.predict(image), model.predict(image))
    assert other.task.decoding == model.task.decoding


@pytest.mark.parametrize("shape", [(4,), (3, 40, 40, 3), (40, 40, 7), (0, 40)])
def test_arrays_that_are_no_image_are_refused(shape: tuple[int, ...], trained: Path) -> None:
    model = load(str(find_checkpoint(trained, "best")))
    with pytest.raises(ValueError, match="an image is"):
        model.predict(np.zeros(shape))


@pytest.mark.parametrize(
    "choice",
    [
        *({"diameter": value} for value in (-5, "small", np.nan, None)),
        {"invert": "yes"},
    ],
)
def test_choices_that_are_none_are_refused(choice: dict[str, Any], trained: Path) -> None:
    model = load(str(find_checkpoint(trained, "best")))
    with pytest.raises(ValueError, match=f"{next(iter(choice))}=.*: must be"):
        model.predict(np.zeros((40, 40)), **choice)


def test_an_image_is_inverted_where_that_is_said_in_any_way() -> None:
    image = generate(3, size=64)[0]
    model = load("nuclei-1", "torch")
    expected = model.predict(255 - image, invert=False)
    assert expected.max() > 0
    for true in (True, np.True_, 1):
        np.testing.assert_array_equal(model.predict(image, invert=true), expected)  # type: ignore[arg-type]


def test_a_model_is_named_by_a_path_and_a_runtime_that_is_none_is_refused(trained: Path) -> None:
    path = find_checkpoint(trained, "best")
    image = generate(3, size=40)[0]
    nested = load(path, "torch").predict(image.tolist())  # type: ignore[arg-type]
    np.testing.assert_array_equal(nested, load(str(path), "torch").predict(image))
    with pytest.raises(InputError, match="runtime 'foo': must be one of auto, torch"):
        load(path, "foo")  # type: ignore[arg-type]


def test_importing_the_package_stays_quick() -> None:
    code = "import cellseg, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_best_is_the_newest_of_several_runs(tmp_path: Path) -> None:
    for age, run in enumerate(("b", "c", "a")):
        path = tmp_path / run / "best.ckpt"
        path.parent.mkdir()
        path.touch()
        os.utime(path, (1000 - age,) * 2)
    assert resolve("best", str(tmp_path)) == tmp_path / "b" / "best.ckpt"
