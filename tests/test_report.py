from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import label
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cellseg.data.datamodule import NucleiDataModule
from cellseg.data.groups import dsb2018
from cellseg.data.synthetic import generate
from cellseg.instances import Decoding
from cellseg.metrics import compare, scores
from cellseg.scoring.files import write_report
from cellseg.scoring.scored import Scored, add, intervals, resample, summary, worst
from cellseg.task import SegmentationTask
from cellseg.training import tuning
from conftest import SMALL, cellseg, find_checkpoint, write_nuclei

Fails = Callable[..., str]


def shifted(labels: NDArray[np.uint16], pixels: int) -> NDArray[np.uint16]:
    return np.roll(labels, pixels, axis=1)


def scored(number: int, group: str, shift: int) -> Scored:
    labels = generate(number)[1]
    return Scored(str(number), group, "", compare(labels, shifted(labels, shift)))


def write_preds(root: Path, folder: Path, shift: int, name: str = "{}_labels.tif") -> Path:
    folder.mkdir()
    for path in sorted((root / "masks").iterdir()):
        labels = shifted(np.asarray(Image.open(path)), shift)
        Image.fromarray(labels).save(folder / name.format(path.stem))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nuclei(tmp_path_factory.mktemp("report"), 8)


def read_report(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / "metrics.json").read_text())
    return content


class TestInterval:
    def test_it_is_that_of_the_means_of_fields(self) -> None:
        # Ten fields of one image each: the standard error of a mean, in closed form.
        images = [scored(number, str(number), number % 3) for number in range(10)]
        values = np.array([image.scores["map"] for image in images])
        low, high = intervals(resample(images))["map"]
        assert low < values.mean() < high
        expected = 2 * 1.96 * values.std() / np.sqrt(10)
        assert high - low == pytest.approx(expected, rel=0.06)

    def test_tiles_of_one_field_are_no_further_evidence(self) -> None:
        images = [scored(number, str(number), number % 3) for number in range(8)]
        fourfold = [
            Scored(f"{image.id}-{n}", image.group, "", image.sums)
            for image in images
            for n in "abcd"
        ]
        once, often = (intervals(resample(these))["ap50_pooled"] for these in (images, fourfold))
        assert once == pytest.approx(often)

    @pytest.mark.parametrize(("groups", "given"), [(5, False), (6, True)])
    def test_it_needs_six_fields(self, groups: int, given: bool) -> None:
        images = [scored(number, str(number % groups), 1) for number in range(8)]
        assert bool(intervals(resample(images))) == given

    def test_the_mean_of_the_samples_is_the_score(self) -> None:
        images = [scored(number, str(number // 2), number % 4) for number in range(16)]
        values = summary(images)
        for name, samples in resample(images).items():
            if not name.endswith("_pooled"):  # a ratio of sums, whose samples are biased
                near = 0.01 * max(1, values[name])
                assert np.mean(samples) == pytest.approx(values[name], abs=near), name


def test_a_report_compares_pairs_and_tells_of_kinds_whatever_the_order(tmp_path: Path) -> None:
    images = [
        Scored(str(number), str(number), "ab"[number % 2], scored(number, "", 1 + number % 3).sums)
        for number in range(8)
    ]
    about, names = {"stage": "test"}, ["mine", "theirs"]
    for name, order in (("one", 1), ("other", -1)):
        (tmp_path / name).mkdir()
        write_report(tmp_path / name, about, images[::order], images[::-order], names)
    for name in ("metrics.json", "metrics.csv", "metrics.md"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "other" / name).read_text()
    report: Any = read_report(tmp_path / "one")
    assert report["difference"]["test/map"] == {"value": 0, "interval": [0, 0]}
    total = {name: sum(image.sums[name] for image in images) for name in images[0].sums}
    assert report["test/pq_pooled"] == pytest.approx(scores(total)["pq"])
    mean = np.mean([image.scores["map"] for image in images[1::2]])
    assert report["modalities"].keys() == {"a", "b"}
    assert report["modalities"]["b"]["images"] == 4
    assert report["modalities"]["b"]["map"] == pytest.approx(mean)
    assert "\n| b | 4 | " in (tmp_path / "one" / "metrics.md").read_text()
    # Of one field and of no known kind.
    (tmp_path / "few").mkdir()
    write_report(tmp_path / "few", about, [Scored(each.id, "", "", each.sums) for each in images])
    report, text = read_report(tmp_path / "few"), (tmp_path / "few" / "metrics.md").read_text()
    assert report["intervals"] == "too few groups for an interval" and not report["modalities"]
    assert "too few groups for an interval" in text and "modality" not in text


def test_labels_of_any_origin_are_scored_without_a_model(root: Path, tmp_path: Path) -> None:
    for name in ("{}.png", "{}_labels.tif", "{}_cp_masks.png"):
        folder = write_preds(root, tmp_path / name[2:], 2, name)
        out = tmp_path / f"out{name[2:]}"
        args = ("--data.root", root, "--trainer.default_root_dir", out)
        assert cellseg("test", "--data.preds_dir", folder, *args) == 0
        report = read_report(out)
        labels = [np.asarray(Image.open(path)) for path in sorted((root / "masks").iterdir())]
        each = [scores(compare(truth, shifted(truth, 2))) for truth in labels]
        for key in ("dice", "ap50", "map", "pq"):
            assert report[f"test/{key}"] == pytest.approx(np.mean([s[key] for s in each]))
        rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
        assert [float(row["map"]) for row in rows] == pytest.approx(
            [s["map"] for s in each], abs=1e-5
        )
        assert {"metrics.json", "metrics.csv", "metrics.md", "worst.png"} == {
            path.name for path in out.iterdir()
        }


def test_two_folders_are_compared_image_by_image(root: Path, tmp_path: Path) -> None:
    one, two = (write_preds(root, tmp_path / f"1, {shift}", shift) for shift in (1, 3))
    args = ("--data.root", root, "--trainer.default_root_dir", tmp_path / "out")
    assert cellseg("test", "--data.preds_dir", f"['{one}', '{two}']", *args) == 0
    report = read_report(tmp_path / "out")
    difference = report["difference"]["test/map"]  # type: ignore[index]
    assert difference["value"] == pytest.approx(report["test/map"] - report["other"]["test/map"])  # type: ignore[index,operator]
    low, high = difference["interval"]
    # Every image is better in the first, so the paired interval does not hold 0.
    assert 0 < low < difference["value"] < high
    table = (tmp_path / "out" / "metrics.md").read_text()
    assert f" | {difference['value']:+.3f} | " in table
    assert f"\n| score | {one} | {two} | difference | 95 % interval |\n|---|--:|" in table


def test_an_image_is_not_taken_for_its_prediction(root: Path, tmp_path: Path, fails: Fails) -> None:
    shown = tmp_path / "shown"
    shutil.copytree(root / "images", shown)
    for path in shown.iterdir():
        Image.open(path).convert("L").save(path)
    both = tmp_path / "both"
    shutil.copytree(shown, both / "images")
    shutil.copytree(root / "masks", both / "masks")
    args = ("--data.root", both, "--trainer.default_root_dir", tmp_path / "out")
    assert "n00.png: is the image, not its labels" in fails(
        "test", "--data.preds_dir", shown, *args
    )
    for path in (root / "masks").iterdir():  # beside its image, but for one
        if path.stem != "n03":
            shutil.copy(path, shown / f"{path.stem}_labels.png")
    assert cellseg("test", "--data.preds_dir", shown, *args) == 0
    assert read_report(tmp_path / "out")["left_out"] == ["n03"]


def test_an_empty_prediction_of_a_black_image_is_one(tmp_path: Path) -> None:
    root = write_nuclei(tmp_path / "root", 2)
    for folder in ("images", "masks"):
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(root / folder / "black.png")
    folder = write_preds(root, tmp_path / "preds", 0)
    args = ("--data.test_dir", root, "--trainer.default_root_dir", tmp_path / "out")
    assert cellseg("test", "--data.preds_dir", folder, *args) == 0
    assert read_report(tmp_path / "out")["test/map"] == 1


def test_what_is_scored_is_what_predict_finds(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for number in range(2):  # of large nuclei, and in the negative
        image, labels = generate(number, size=160)
        large = Image.fromarray(255 - image).resize((480, 480), Image.Resampling.BICUBIC)
        large.save(root / "images" / f"{number}.png")
        mask = labels.repeat(3, 0).repeat(3, 1).astype(np.uint16)
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    preds = ("--data.predict_dir", root / "images", "--output.dir", tmp_path / "preds")
    assert cellseg("predict", *preds, "--data.num_workers", 0) == 0
    scores = []
    for how in (
        ("--data.preds_dir", tmp_path / "preds"),
        ("--data.num_workers", 0),
        ("--data.num_workers", 0, "--data.diameter", "none", "--data.invert", "false"),
    ):
        args = ("--data.test_dir", root, "--trainer.default_root_dir", tmp_path / "out")
        assert cellseg("test", *args, *how) == 0
        scores.append(read_report(tmp_path / "out")["test/map"])
    assert scores[0] == scores[1]
    assert scores[1] > scores[2] + 0.2  # type: ignore[operator]


def test_a_model_in_half_precision_is_scored(root: Path, tmp_path: Path) -> None:
    args = ("--data.test_dir", root, "--trainer.default_root_dir", tmp_path)
    assert cellseg("test", *args, "--trainer.precision", "bf16-true", "--data.num_workers", 0) == 0
    assert (tmp_path / "worst.png").is_file()


def test_images_without_a_prediction_are_left_out_by_name(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_preds(root, tmp_path / "preds", 1)
    (folder / "n03_labels.tif").unlink()
    args = ("--data.root", root, "--trainer.default_root_dir", tmp_path / "out")
    assert cellseg("test", "--data.preds_dir", folder, *args) == 0
    assert "Images without a prediction are left out: n03" in capfd.readouterr().err
    report = read_report(tmp_path / "out")
    assert (report["images"], report["left_out"]) == (7, ["n03"])


def test_binary_predictions_are_their_components_as_binary_masks_are(
    root: Path, tmp_path: Path
) -> None:
    binary = tmp_path / "binary"
    binary.mkdir()
    for path in (root / "masks").iterdir():
        mask = (np.asarray(Image.open(path)) > 0).astype(np.uint8) * 255
        Image.fromarray(mask).save(binary / path.name)
    args = ("--data.root", root, "--trainer.default_root_dir", tmp_path / "out")
    assert cellseg("test", "--data.preds_dir", binary, *args) == 0
    with (tmp_path / "out" / "metrics.csv").open() as lines:
        predicted = {row["image"]: int(row["predicted"]) for row in csv.DictReader(lines)}
    masks = {path.stem: np.asarray(Image.open(path)) for path in (root / "masks").iterdir()}
    assert predicted == {name: label(mask > 0).max() for name, mask in masks.items()}


def test_flags_that_a_scoring_does_not_use_are_refused(
    trained: Path, root: Path, fails: Fails
) -> None:
    masks = ("--data.preds_dir", root / "masks", "--data.root", root)
    assert "--data.preds_dir is for test" in fails("validate", *masks)
    assert "--data.test_dir is for test" in fails("validate", "--data.test_dir", root)
    assert "leave out --ckpt_path" in fails("test", *masks, "--ckpt_path", "nuclei-1")


def test_labels_are_scored_whatever_weights_a_config_names(root: Path, tmp_path: Path) -> None:
    masks = ("--data.preds_dir", root / "masks", "--data.root", root)
    where = ("--trainer.default_root_dir", tmp_path)
    assert cellseg("test", "--config", "finetune.yaml", *masks, *where) == 0


def test_some_images_of_the_known_set_are_trained_on_and_scored(tmp_path: Path) -> None:
    root = write_nuclei(tmp_path / "data", 4)
    train = [name for name, row in dsb2018().items() if row["split"] == "train"]
    fields = {dsb2018()[name]["field"]: name for name in train}
    for path, name in zip(sorted((root / "images").iterdir()), fields.values(), strict=False):
        for folder in ("images", "masks"):
            (root / folder / path.name).rename(root / folder / f"{name}.png")
    args = ("--data.root", root, "--trainer.default_root_dir", tmp_path / "out")
    assert cellseg("fit", *args, "--trainer.max_epochs", 1, *SMALL) == 0
    assert cellseg("test", "--data.preds_dir", root / "masks", *args) == 0
    assert read_report(tmp_path / "out")["images"] == 4


def test_predictions_that_cannot_be_scored_are_refused(
    root: Path, tmp_path: Path, fails: Fails
) -> None:
    args = ("--data.root", root, "--trainer.default_root_dir", tmp_path / "out")
    assert "no such folder" in fails("test", "--data.preds_dir", tmp_path / "nowhere", *args)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "n00_labels.tif" in fails("test", "--data.preds_dir", empty, *args)
    folder = write_preds(root, tmp_path / "preds", 1)
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(folder / "n02_labels.tif")
    line = fails("test", "--data.preds_dir", folder, *args)
    assert "n02_labels.tif: 9 x 9 px" in line
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(folder / "n02_labels.tif")
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(folder / "n02_masks.tif")
    assert "n02 has several predictions" in fails("test", "--data.preds_dir", folder, *args)
    assert not (tmp_path / "out").exists()


def test_a_model_is_reported_with_the_ten_worst_images(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = write_nuclei(tmp_path / "other", 12, start=60)
    out = tmp_path / "out"
    args = ("--data.root", root, "--trainer.default_root_dir", out, "--data.num_workers", 0)
    ckpt = find_checkpoint(trained, "best")
    assert cellseg("test", "--ckpt_path", ckpt, *args, "--decode.min_area", 3) == 0
    report = read_report(out)
    assert report["decoding"]["min_area"] == 3  # type: ignore[index]
    assert len(report["worst"]) == 10  # type: ignore[arg-type]
    assert set(report["intervals"]) >= {"test/dice", "test/map", "test/ap50_pooled"}  # type: ignore[call-overload]
    text = (out / "metrics.md").read_text()
    assert text in capfd.readouterr().out
    assert "| aggregated Jaccard |" in text
    # Ten rows of 64 px, each below its caption.
    with Image.open(out / "worst.png") as picture:
        assert picture.height == 10 * (64 + 16)
    logs = [EventAccumulator(str(p)).Reload() for p in out.rglob("events.out.tfevents.*")]
    shown = [tag for log in logs for tag in log.Tags()["images"] if tag.startswith("test/worst/")]
    assert len(shown) == 10
    assert any("test/map" in log.Tags()["scalars"] for log in logs)


def test_a_test_folder_of_ones_own_is_scored_whole(
    trained: Path,
    nuclei: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    fails: Fails,
) -> None:
    args = ("--ckpt_path", find_checkpoint(trained), "--data.num_workers", 0)
    out = ("--trainer.default_root_dir", tmp_path)
    other = write_nuclei(tmp_path / "own", 3, start=90)
    assert cellseg("test", *args, "--data.root", nuclei, "--data.test_dir", other, *out) == 0
    assert read_report(tmp_path)["images"] == 3
    assert "trained on" not in capfd.readouterr().err
    assert "--data.test_dir nowhere: no such" in fails("test", *args, "--data.test_dir", "nowhere")
    assert cellseg("test", *args, "--data.test_dir", nuclei, *out) == 0
    assert "Images to evaluate on were trained on" in capfd.readouterr().err


@pytest.mark.slow
def test_folds_of_a_small_set_make_one_report(
    root: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    fails: Fails,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for fold in range(3):
        run = ("--trainer.default_root_dir", tmp_path / "folds" / str(fold))
        args = ("--data.root", root, "--data.folds", 3, "--data.fold", fold, *run, *SMALL)
        assert cellseg("fit", *args, "--trainer.max_epochs", 1) == 0
    out = ("--trainer.default_root_dir", tmp_path / "out", "--data.num_workers", 0)
    assert cellseg("test", "--ckpt_path", tmp_path / "folds", "--data.root", root, *out) == 0
    report = read_report(tmp_path / "out")
    assert report["images"] == 8  # each once, by the model that was not trained on it
    assert report["data"].count("images, train") == 3
    losses = []
    for fold in range(3):
        one = ("--ckpt_path", find_checkpoint(tmp_path / "folds" / str(fold), "best"))
        assert cellseg("test", *one, "--data.root", root, *out) == 0
        alone = read_report(tmp_path / "out")
        losses.append(alone["test/loss"] * alone["images"] / 8)
    assert report["test/loss"] == pytest.approx(sum(losses), rel=1e-5)
    assert capfd.readouterr().out.count("panoptic quality") == 4
    # Levels that the user names hold for every fold: with these all of an image is one nucleus.
    folds = ("--ckpt_path", tmp_path / "folds", "--data.root", root)
    levels = ("--decode.threshold", 0, "--decode.marker", -1, "--decode.min_area", 0)
    assert cellseg("test", *folds, *out, *levels) == 0
    with (tmp_path / "out" / "metrics.csv").open() as lines:
        assert [row["predicted"] for row in csv.DictReader(lines)] == ["1"] * 8
    # Also where they are those of the first fold. The size of the nuclei is of each.
    diameters: list[float] = []
    end = SegmentationTask.on_test_epoch_end

    def watch(task: SegmentationTask) -> None:
        diameters.append(task.diameter)
        end(task)

    monkeypatch.setattr(SegmentationTask, "on_test_epoch_end", watch)
    for fold in range(3):
        path = find_checkpoint(tmp_path / "folds" / str(fold), "best")
        stored = torch.load(path, weights_only=True)
        stored["decoding"].update(threshold=0.0 if fold == 0 else 0.9, marker=-1.0, min_area=0)
        stored["NucleiDataModule"]["diameter"] = 20.0 + fold
        torch.save(stored, path)
    assert cellseg("test", *folds, *out, *levels) == 0
    assert diameters == [20, 21, 22]
    assert read_report(tmp_path / "out")["decoding"] != "of each checkpoint"
    with (tmp_path / "out" / "metrics.csv").open() as lines:
        assert [row["predicted"] for row in csv.DictReader(lines)] == ["1"] * 8
    assert cellseg("test", *folds, *out) == 0
    assert read_report(tmp_path / "out")["decoding"] == "of each checkpoint"
    assert "no best checkpoint" in fails("test", "--ckpt_path", root, "--data.root", root)
    # Else images would be scored once by each, also by those that were trained on them.
    folds_of = ("test", "--ckpt_path", tmp_path / "folds", "--data.root")
    line = fails(*folds_of, root, "--data.test_dir", root)
    assert "tested on; for other images or another split name one checkpoint" in line
    config = next(path for path in (tmp_path / "folds" / "1").rglob("config.yaml"))
    line = fails(*folds_of, root, "--config", config)
    assert "tested on; a config of theirs needs --data.folds 0 --data.fold 0 here; for" in line
    assert cellseg(*folds_of, root, "--config", config, "--data.folds", 0, "--data.fold", 0) == 0
    other = write_nuclei(tmp_path / "other", 3, start=70)
    assert f"nothing of {other}" in fails(*folds_of, other)
    stored["hyper_parameters"]["base_channels"] = 5
    torch.save(stored, path)
    assert "another model.base_channels" in fails("test", *folds)
    stored["hyper_parameters"]["base_channels"] = 4
    torch.save(stored, path)
    shutil.copytree(tmp_path / "folds" / "1", tmp_path / "folds" / "again")
    assert "have test images in common" in fails("test", *folds)


@pytest.mark.parametrize("known", [pytest.param(False, marks=pytest.mark.slow), True])
def test_folds_that_start_from_weights_make_one_report_of_their_own_images(
    known: bool, trained: Path, tmp_path: Path
) -> None:
    root = write_nuclei(tmp_path / "root", 8, start=40)
    start = torch.load(find_checkpoint(trained, "best"), weights_only=True)
    if known:  # as those of the Data Science Bowl are to nuclei-1
        _, samples = NucleiDataModule(root=root, cache_dir=tmp_path / "cache").annotated()
        tests = start["NucleiDataModule"]["split"]["test"]
        tests.update((sample.digest(), sample.id) for sample in samples)
    torch.save(start, tmp_path / "start.ckpt")
    weights = ("--model.weights", tmp_path / "start.ckpt")  # with a test side of its own
    for fold in range(3):
        run = ("--trainer.default_root_dir", tmp_path / "folds" / str(fold))
        args = ("--data.root", root, "--data.folds", 3, "--data.fold", fold, *run, *weights, *SMALL)
        assert cellseg("fit", *args, "--trainer.max_epochs", 1) == 0
    out = ("--trainer.default_root_dir", tmp_path / "out", "--data.num_workers", 0)
    assert cellseg("test", "--ckpt_path", tmp_path / "folds", "--data.root", root, *out) == 0
    assert read_report(tmp_path / "out")["images"] == 8


def test_a_small_set_is_offered_folds(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    args = ("--data.root", root, "--trainer.default_root_dir", tmp_path, *SMALL)
    assert cellseg("fit", *args, "--trainer.max_epochs", 1) == 0
    assert "--data.fold 0 to 4 of --data.folds 5" in capfd.readouterr().err
    args = ("--data.root", write_nuclei(tmp_path / "two", 2), *args[2:])
    assert cellseg("fit", *args, "--trainer.max_epochs", 1) == 0
    assert "--data.folds" not in capfd.readouterr().err


def test_tuning_is_stored_in_both_checkpoints_and_a_run_that_goes_on_scores_as_before(
    nuclei: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = Decoding(threshold=0.35, marker=0.1, min_area=3)
    monkeypatch.setattr(tuning, "tune", lambda *_: (levels, 0.5))
    run = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path, *SMALL)
    for epochs in (1, 2):
        resumed = ("--ckpt_path", "last") if epochs == 2 else ()
        assert cellseg("fit", *run, "--trainer.max_epochs", epochs, *resumed) == 0
        for name in ("best", "last"):
            content = torch.load(find_checkpoint(tmp_path, name), weights_only=True)
            assert content["decoding"] == asdict(levels)
            assert content["scored_with"] == asdict(Decoding())
            assert "decoding" not in content["hyper_parameters"]


def test_the_worst_images_are_those_of_lowest_mean_ap_and_keep_their_pictures() -> None:
    images: list[Scored] = []
    truth = np.zeros((10, 100), int)
    truth[:] = 1
    for number in (5, 0, 9, 3, 11, 7, 1, 10, 2, 8, 4, 6):
        preds = truth.copy()
        preds.ravel()[: 40 * number] = 0  # the more is missing, the worse
        one = Scored(f"{number:02d}", "", "", compare(truth, preds))
        add(images, one, lambda: np.zeros((1, 1, 3), np.uint8))
    assert "00" not in {image.id for image in worst(images)}
    aps = sorted(image.scores["map"] for image in images)
    assert [image.scores["map"] for image in worst(images)] == aps[:10]
    assert {i.id for i in images if i.picture is not None} == {i.id for i in worst(images)}


def test_an_image_that_one_of_two_folders_lacks_is_left_out_of_both(tmp_path: Path) -> None:
    root = write_nuclei(tmp_path / "root", 3)
    for name in ("one", "two"):
        shutil.copytree(root / "masks", tmp_path / name)
    (tmp_path / "two" / "n01.png").unlink()
    args = ("--data.test_dir", root, "--trainer.default_root_dir", tmp_path / "out")
    folders = f"{tmp_path / 'one'},{tmp_path / 'two'}"
    assert cellseg("test", "--data.preds_dir", folders, *args) == 0
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (report["images"], report["left_out"]) == (2, ["n01"])
