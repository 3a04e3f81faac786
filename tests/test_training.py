from __future__ import annotations

import csv
import errno
import json
import logging
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Timer
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cellseg.errors import OutputError
from cellseg.failures import explained
from cellseg.instances import Decoding
from cellseg.task import LOGGED, SegmentationTask, warmup_cosine
from cellseg.training.dashboard import Dashboard, _add_pr_curve
from cellseg.training.forecast import Forecast
from conftest import SMALL, cellseg, find_checkpoint, run_process, write_nuclei

Fails = Callable[..., str]
# The decoding of a run until it is tuned.
DECODE = ("--decode.threshold", "0.5", "--decode.marker", "0.5", "--decode.min_area", "10")

STOPPER = """
import os, signal, sys
from lightning.pytorch import Callback
from cellseg.training import tuning
from cellseg.cli import main

class Stop(Callback):
    def __init__(self, step: int, how: str, where: str):
        self.step, self.how, self.where = step, how, where
        if where == "tuning":
            tuning.tune = lambda *args: os.killpg(0, signal.SIGINT)
    def on_train_batch_start(self, trainer, *args):
        self.stop("accumulating", trainer)
    def on_train_batch_end(self, trainer, *args):
        self.stop("training", trainer)
    def on_after_backward(self, trainer, *args):
        self.stop("backward", trainer)
    def on_validation_batch_end(self, trainer, *args):
        self.stop("validation", trainer)
    def stop(self, where, trainer):
        if trainer.global_step == self.step and self.where == where:
            if self.how == "raise":
                raise RuntimeError("a bug")
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            # As schedulers and terminals do, the loader's process too.
            os.killpg(0, signal.SIGTERM if self.how == "term" else signal.SIGINT)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run with "&"
    sys.exit(main(allow=["__main__"]))
"""


@pytest.mark.parametrize("size", [1, 3, 5, 6, 65])
def test_panels_show_as_many_images_as_there_are(size: int) -> None:
    trainer = SimpleNamespace(num_val_batches=[size])
    shown = Dashboard(images=4)._panel_batches(trainer)  # type: ignore[arg-type]
    assert len(shown) == min(4, size)
    assert 0 <= min(shown) <= max(shown) < size


def scalars(run: Path, tag: str) -> dict[int, float]:
    """A curve over all event files of a run."""
    curve: dict[int, float] = {}
    for events in sorted(run.rglob("events.out.tfevents.*"), key=lambda p: p.stat().st_mtime_ns):
        log = EventAccumulator(str(events)).Reload()
        if tag in log.Tags()["scalars"]:
            curve |= {event.step: event.value for event in log.Scalars(tag)}
    return curve


def step_of(ckpt: Path) -> int:
    return int(torch.load(ckpt, weights_only=True)["global_step"])


def run_script(tmp_path: Path, *args: object) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "stopper.py"
    script.write_text(STOPPER)
    # One thread, so that sums are taken in one order.
    return subprocess.run(
        ["env", "OMP_NUM_THREADS=1", sys.executable, script, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        start_new_session=True,
    )


def stop_at(tmp_path: Path, step: int, how: str, where: str = "training") -> Path:
    config = tmp_path / f"stop-{how}-{step}.yaml"
    config.write_text(
        "trainer: {callbacks: [{class_path: __main__.Stop, "
        f"init_args: {{step: {step}, how: {how}, where: {where}}}}}]}}"
    )
    return config


@pytest.mark.parametrize(
    ("how", "code", "kept"),
    [
        # Four steps an epoch: the sixth is in the middle of the second.
        ("term", 143, 6),
        pytest.param("interrupt", 130, 6, marks=pytest.mark.slow),
        pytest.param("kill", -9, 4, marks=pytest.mark.slow),
    ],
)
def test_fault_18_stopped_in_mid_epoch_then_resumed_gives_the_uninterrupted_curve(
    how: str, code: int, kept: int, nuclei: Path, tmp_path: Path
) -> None:
    def fit(run: str) -> tuple[object, ...]:
        return (
            *("fit", "--data.root", nuclei, "--trainer.default_root_dir", tmp_path / run),
            *("--trainer.max_epochs", 3, "--trainer.log_every_n_steps", 1, *SMALL),
            *("--data.num_workers", 1),
        )

    assert cellseg(*fit("whole")) == 0
    stopped = run_script(tmp_path, *fit("parts"), "--config", stop_at(tmp_path, 6, how))
    assert stopped.returncode == code, stopped.stderr
    assert ("Stopped, so not tuned" in stopped.stderr) == (how in ("term", "interrupt"))
    assert step_of(find_checkpoint(tmp_path / "parts")) == kept
    assert cellseg(*fit("parts"), "--ckpt_path", "last") == 0
    whole, parts = (scalars(tmp_path / run, "train/loss") for run in ("whole", "parts"))
    assert len(whole) == 12
    rest = [step for step in whole if step >= kept]
    np.testing.assert_allclose(
        [parts[step] for step in rest], [whole[step] for step in rest], rtol=1e-6
    )
    # It is one run: one folder, one best checkpoint.
    assert len(list((tmp_path / "parts").rglob("best*.ckpt"))) == 1


@pytest.mark.parametrize(
    ("accumulate", "how", "code", "where"),
    [
        (3, "term", 143, "accumulating"),
        pytest.param(1, "interrupt", 130, "backward", marks=pytest.mark.slow),
        # Before the batch is looked at.
        pytest.param(1, "interrupt", 130, "accumulating", marks=pytest.mark.slow),
    ],
)
def test_fault_18_stopped_between_two_steps_it_takes_their_batches_again(
    accumulate: int, how: str, code: int, where: str, nuclei: Path, tmp_path: Path
) -> None:
    def fit(run: str) -> tuple[object, ...]:
        return (
            *("fit", "--data.root", nuclei, "--trainer.default_root_dir", tmp_path / run),
            *("--trainer.max_epochs", 1, *SMALL),
            *("--data.crops_per_epoch", 16 * accumulate),
            *("--trainer.accumulate_grad_batches", accumulate),
        )

    assert cellseg(*fit("whole")) == 0
    stopped = run_script(tmp_path, *fit("parts"), "--config", stop_at(tmp_path, 2, how, where))
    assert stopped.returncode == code, stopped.stderr
    assert cellseg(*fit("parts"), "--ckpt_path", "last") == 0
    whole, parts = (
        torch.load(find_checkpoint(tmp_path / run), weights_only=True) for run in ("whole", "parts")
    )
    assert whole["global_step"] == parts["global_step"] == 4
    # The statistics of batch normalisation too, which see each batch once.
    torch.testing.assert_close(parts["state_dict"], whole["state_dict"])


def test_steps_that_end_within_an_epoch_are_validated_and_tuned(
    nuclei: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs"
    code = cellseg(
        *("fit", "--data.root", nuclei, "--trainer.default_root_dir", run, *SMALL),
        *("--trainer.max_epochs", -1, "--trainer.max_steps", 6),  # four steps an epoch
    )
    assert code == 0
    assert "not tuned" not in capsys.readouterr().err
    assert len(scalars(run, "val/map")) == 2
    assert step_of(find_checkpoint(run)) == 6


@pytest.mark.parametrize(
    ("how", "code"), [pytest.param("term", 143, marks=pytest.mark.slow), ("interrupt", 130)]
)
@pytest.mark.slow
def test_fault_18_stopped_while_validating_it_ends_at_once_and_validates_anew(
    how: str, code: int, tmp_path: Path
) -> None:
    data = write_nuclei(tmp_path / "data", 40)  # four of them to validate on

    def fit(run: str) -> tuple[object, ...]:
        return (
            *("fit", "--data.root", data, "--trainer.default_root_dir", tmp_path / run),
            *("--trainer.max_epochs", 2, *SMALL, "--data.num_workers", 1),
        )

    assert cellseg(*fit("whole")) == 0
    config = stop_at(tmp_path, 4, how, "validation")
    stopped = run_script(tmp_path, *fit("parts"), "--config", config)
    assert stopped.returncode == code, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert step_of(find_checkpoint(tmp_path / "parts")) == 4
    assert cellseg(*fit("parts"), "--ckpt_path", "last") == 0
    assert step_of(find_checkpoint(tmp_path / "parts")) == 8
    for score in ("val/loss", "val/map"):
        whole, parts = (scalars(tmp_path / run, score) for run in ("whole", "parts"))
        assert len(whole) == 2
        assert parts == pytest.approx(whole, rel=1e-6)


def test_a_run_that_is_stopped_while_tuning_is_tuned_by_the_next(
    trained: Path, nuclei: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fit(run: str) -> tuple[object, ...]:
        return (
            *("fit", "--data.root", nuclei, "--trainer.default_root_dir", tmp_path / run),
            *("--trainer.max_epochs", 1, *SMALL),
        )

    def last(run: str) -> dict[str, Any]:
        return torch.load(find_checkpoint(tmp_path / run), weights_only=True)

    # So that there is a mixture to be tried before.
    weights = ("--model.weights", find_checkpoint(trained, "best"))
    assert cellseg(*fit("whole"), *weights) == 0
    config = stop_at(tmp_path, 0, "interrupt", "tuning")
    stopped = run_script(tmp_path, *fit("parts"), *weights, "--config", config)
    assert stopped.returncode == 130, stopped.stderr
    assert "tuned" not in last("parts")
    torch.testing.assert_close(last("parts")["state_dict"], last("whole")["state_dict"])
    capfd.readouterr()
    assert cellseg(*fit("parts"), "--ckpt_path", "last") == 0
    assert "Trained to its end already" in capfd.readouterr().err
    assert last("parts")["decoding"] == last("whole")["decoding"]
    best = [find_checkpoint(tmp_path / run, "best") for run in ("parts", "whole")]
    one, other = (torch.load(path, weights_only=True) for path in best)
    torch.testing.assert_close(one["state_dict"], other["state_dict"])
    assert cellseg(*fit("parts"), "--ckpt_path", "last") == 0
    assert "Tuned on" not in capfd.readouterr().err


def test_fault_18_sigterm_ends_the_tuning(
    nuclei: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def stopped(*args: Any) -> tuple[Decoding, float]:
        signal.raise_signal(signal.SIGTERM)
        return Decoding(), 0.0

    monkeypatch.setattr("cellseg.training.tuning.tune", stopped)
    args = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path, *SMALL)
    assert cellseg("fit", *args, "--trainer.max_epochs", 1) == 143
    assert "Stopped, so not tuned" in capfd.readouterr().err
    for name in ("best", "last"):
        assert "tuned" not in torch.load(find_checkpoint(tmp_path, name), weights_only=True)


def test_fault_16_a_full_disk_in_fit_is_one_line_and_keeps_what_there_is(
    nuclei: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    args = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path, *SMALL)
    assert cellseg("fit", *args, "--trainer.max_epochs", 1) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.ckpt")}

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", full)
    more = ("--ckpt_path", "last", "--trainer.max_epochs", 2)
    assert cellseg("fit", *args, *more) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("cellseg: error: ") and "No space left on device" in last
    assert {path: path.read_bytes() for path in before} == before


def test_last_is_of_the_last_epoch_also_where_the_best_is_older(
    nuclei: Path, tmp_path: Path
) -> None:
    args = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path, *SMALL)
    falling = ("--checkpoint.monitor", "train/lr")  # after the warm-up
    assert cellseg("fit", *args, *falling, "--trainer.max_epochs", 3) == 0
    assert step_of(find_checkpoint(tmp_path, "best")) == 4
    assert step_of(find_checkpoint(tmp_path, "last")) == 12


def test_an_exception_leaves_a_last_checkpoint_and_the_best_alone(
    nuclei: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = run_script(
        tmp_path,
        *("fit", "--data.root", nuclei, "--trainer.default_root_dir", run, *SMALL),
        *("--trainer.max_epochs", 3, "--config", stop_at(tmp_path, 6, "raise")),
    )
    assert done.returncode == 1
    assert "a bug" in done.stderr
    steps = {name: step_of(find_checkpoint(run, name)) for name in ("best", "last")}
    assert steps == {"best": 4, "last": 6}


def test_last_without_a_checkpoint_is_refused_instead_of_starting_anew(
    nuclei: Path, tmp_path: Path, fails: Fails
) -> None:
    root = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path)
    assert str(tmp_path) in fails("fit", "--ckpt_path", "last", *root)
    assert "no such file" in fails("fit", "--ckpt_path", tmp_path / "none.ckpt", *root)


def test_last_is_found_in_a_new_process_and_training_goes_on(
    nuclei: Path, tmp_path: Path, trained: Path
) -> None:
    args = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path, *SMALL)
    assert cellseg("fit", *args, "--trainer.max_epochs", 1) == 0
    done = run_process("fit", *args, "--trainer.max_epochs", 2, "--ckpt_path", "last")
    assert done.returncode == 0, done.stderr
    last = torch.load(find_checkpoint(tmp_path), weights_only=True)
    assert last["global_step"] == 8
    assert last["epoch"] == 1


@pytest.mark.parametrize("alike", [True, False])
def test_a_run_that_cannot_go_on_leaves_its_checkpoint_alone(
    alike: bool,
    nuclei: Path,
    trained: Path,
    tmp_path: Path,
    fails: Fails,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def other(task: SegmentationTask) -> torch.optim.Optimizer:
        # In as many groups as AdamW has, its state fits until a step looks for what is its own.
        sides = ([p for p in task.parameters() if (p.ndim > 1) == large] for large in (True, False))
        return torch.optim.SGD([{"params": side} for side in sides] if alike else task.parameters())

    run = shutil.copytree(trained, tmp_path / "run")
    before = find_checkpoint(run).read_bytes()
    monkeypatch.setattr(SegmentationTask, "configure_optimizers", other)
    root = ("--data.root", nuclei, "--trainer.default_root_dir", run)
    more = ("--ckpt_path", "last", "--trainer.max_epochs", 3, *SMALL)
    assert "had another optimiser; the script that" in fails("fit", *root, *more)
    assert find_checkpoint(run).read_bytes() == before


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (None, "about 1 h 30 min, or less"),
        ({"hours": 3}, "about 1 h 30 min, or less"),
        ({"minutes": 50}, "about 1 h 30 min, of which --trainer.max_time leaves 20 min, or less"),
    ],
)
def test_after_an_epoch_it_says_how_long_the_others_take(
    limit: dict[str, int] | None,
    said: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("cellseg"), "propagate", True)
    caplog.set_level(logging.INFO)
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    timer = Timer(limit)
    trainer = SimpleNamespace(global_step=500, should_stop=False, callbacks=[timer])
    forecast, task = Forecast(), SegmentationTask(base_channels=4)
    task.total_steps = 2500
    for callback in (timer, forecast):
        callback.on_train_start(trainer, task)
    now += 30 * 60
    for step, ends in ((1000, True), (1000, False), (1500, False)):  # it is said once
        trainer.global_step, trainer.should_stop = step, ends
        forecast.on_train_epoch_end(trainer, task)  # type: ignore[arg-type]
    (line,) = set(caplog.messages)  # which handlers of other tests repeat
    assert line.startswith(f"1,500 steps are left: {said}")
    now += 20 * 60  # the least of the limits is over then
    forecast.on_train_end(trainer, task)  # type: ignore[arg-type]
    assert (f"Stopped at step {step}: --trainer.max_time" in caplog.text) == ("leaves" in said)


def test_a_time_that_is_over_already_is_said(
    nuclei: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    args = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path, *SMALL)
    assert cellseg("fit", *args, "--trainer.max_time", "00:00:00:00") == 0
    assert "a higher --trainer.max_time goes on" in capfd.readouterr().err


@pytest.mark.parametrize(
    "other", [("--data.batch_size", 8), ("--trainer.accumulate_grad_batches", 2)]
)
def test_steps_of_another_size_move_the_end_of_the_learning_rate(
    other: tuple[object, ...], nuclei: Path, tmp_path: Path
) -> None:
    args = ("fit", "--data.root", nuclei, "--trainer.default_root_dir", tmp_path, *SMALL)
    assert cellseg(*args, "--trainer.max_epochs", 2) == 0
    more = ("--trainer.max_epochs", 4, "--trainer.log_every_n_steps", 1, "--model.lr", 1)
    assert cellseg(*args, *other, *more, "--ckpt_path", "last") == 0
    rates = scalars(tmp_path, "train/lr")
    # Eight steps, then two an epoch; the first of them has the rate that was stored.
    for step in (9, 10, 11):
        assert rates[step] == pytest.approx(warmup_cosine(step, 2, 12))


def test_a_learning_rate_that_was_searched_for_is_trained_with(
    nuclei: Path, tmp_path: Path
) -> None:
    args = ("fit", "--data.root", nuclei, "--trainer.default_root_dir", tmp_path, *SMALL)
    finder = tmp_path / "finder.yaml"
    finder.write_text(
        "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.LearningRateFinder, "
        "init_args: {num_training_steps: 20, early_stop_threshold: null}}]}"
    )
    assert cellseg(*args, "--config", finder, "--trainer.max_epochs", 5) == 0
    last = torch.load(find_checkpoint(tmp_path), weights_only=True)
    found = last["hyper_parameters"]["lr"]
    assert found != 0.001  # that of the flag
    assert last["lr_schedulers"][0]["base_lrs"] == [found, found]


class Malice:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", "empty", "text", "foreign", "odd", "directory"]
)
def test_fault_20_damaged_checkpoint(
    damage: str, trained: Path, tmp_path: Path, fails: Fails
) -> None:
    content = bytearray(find_checkpoint(trained).read_bytes())
    path = tmp_path / "model.ckpt"
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    elif damage == "foreign":
        torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}}, path)
    elif damage == "odd":
        torch.save({"hyper_parameters": [1], "state_dict": {}}, path)
    elif damage == "directory":  # of the zip: a name that is no text
        place = content.rindex(b"data.pkl")
        content[place] = 0xFF
        content[content.rindex(b"PK\x01\x02", 0, place) + 9] |= 8  # it is in UTF-8
        path.write_bytes(content)
    else:
        path.write_bytes(b"" if damage == "empty" else b"hello\n")
    line = fails("predict", "--ckpt_path", path, "--data.predict_dir", tmp_path)
    assert str(path) in line


def test_fault_21_checkpoint_that_runs_code_and_http(tmp_path: Path, fails: Fails) -> None:
    target = tmp_path / "executed"
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": Malice(target)}, path)
    assert "refused" in fails("predict", "--ckpt_path", path, "--data.predict_dir", tmp_path)
    path.write_bytes(pickle.dumps(Malice(target)))
    assert str(path) in fails("predict", "--ckpt_path", path, "--data.predict_dir", tmp_path)
    assert not target.exists()
    assert "refused" in fails("fit", "--ckpt_path", "http://127.0.0.1:9/model.ckpt")


def test_checkpoint_holds_only_plain_data(trained: Path) -> None:
    for path in trained.rglob("*.ckpt"):
        content = torch.load(path, weights_only=True)
        split = content["NucleiDataModule"]["split"]
        assert {side: len(ids) for side, ids in split.items()} == {"train": 10, "val": 1, "test": 1}


def test_checkpoint_names_make_no_folders(trained: Path) -> None:
    names = {path.name for path in trained.rglob("checkpoints/*")}
    assert names == {"best.ckpt", "last.ckpt"}


def test_dashboard_has_every_tag(nuclei: Path, tmp_path: Path) -> None:
    args = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path, *SMALL)
    assert cellseg("fit", *args, "--trainer.max_epochs", 2) == 0  # of fewer steps than 10
    tags: dict[str, set[str]] = {}
    for events in tmp_path.rglob("events.out.tfevents.*"):
        for kind, names in EventAccumulator(str(events)).Reload().Tags().items():
            if isinstance(names, list):
                tags.setdefault(kind, set()).update(names)
    scores = {f"val/{name}" for name in ("loss", "dice", "iou", "map", "ap50", "pq", "aji")}
    train = {f"train/{name}" for name in ("loss", "lr", "images_per_second")}
    assert scores | train <= tags["scalars"]
    # What may be monitored, and no more.
    assert {tag for tag in tags["scalars"] if tag.startswith(("train/", "val/"))} == {*LOGGED}
    assert "best/dice" in tags["scalars"]
    assert any(name.startswith("panel/n") for name in tags["images"])
    assert "val/precision_recall" in tags["tensors"]
    assert any(name.startswith("config") for name in tags["tensors"])
    assert any("hparams" in name for name in tags["tensors"] | set(_hparams(tmp_path)))
    assert len(scalars(tmp_path, "val/dice")) == 2
    (folder,) = tmp_path.rglob("version_0")
    events = EventAccumulator(str(folder)).Reload()
    (panel,) = (name for name in tags["images"] if name.startswith("panel/"))
    # A panel lies where the scores of its validation do.
    steps = set(scalars(tmp_path, "val/dice"))
    assert {event.step for event in events.Images(panel)} == steps
    assert {event.step for event in events.Tensors("val/precision_recall")} == steps


def test_the_dashboard_is_drawn_where_tensorboard_is_not_the_first_logger(
    nuclei: Path, tmp_path: Path
) -> None:
    loggers = [
        {
            "class_path": f"lightning.pytorch.loggers.{name}",
            "init_args": {"save_dir": str(tmp_path)},
        }
        for name in ("CSVLogger", "TensorBoardLogger")
    ]
    args = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path, *SMALL)
    logger = ("--trainer.logger", json.dumps(loggers))
    assert cellseg("fit", *args, *logger, "--trainer.max_epochs", 1) == 0
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    tags = EventAccumulator(str(events)).Reload().Tags()
    assert any(name.startswith("panel/") for name in tags["images"])
    assert "best/map" in tags["scalars"]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_training_that_diverges_is_stopped_and_its_weights_are_not_kept(
    every: int, nuclei: Path, tmp_path: Path, fails: Fails
) -> None:
    args = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path, *SMALL)
    often = ("--trainer.max_epochs", 20, "--trainer.check_val_every_n_epoch", every)
    line = fails("fit", *args, *often, "--model.lr", 1e12)
    assert "the loss is no longer a number: a smaller --model.lr" in line
    for path in tmp_path.rglob("*.ckpt"):
        weights = torch.load(path, weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in weights.values())


def test_the_split_is_kept_beside_the_config_and_divides_alike(
    nuclei: Path, tmp_path: Path
) -> None:
    def run(name: str, *flags: object) -> tuple[str, dict[str, Any]]:
        where = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path / name)
        assert cellseg("fit", *where, *SMALL, "--trainer.max_epochs", 1, *flags) == 0
        (table,) = (tmp_path / name).rglob("split.csv")
        assert (table.parent / "config.yaml").is_file()
        content = torch.load(find_checkpoint(tmp_path / name), weights_only=True)
        return table.read_text(), content["NucleiDataModule"]["split"]

    table, split = run("first", "--data.split_seed", 3)
    rows = {row["image_id"]: row["split"] for row in csv.DictReader(table.splitlines())}
    assert rows == {sample: side for side, of in split.items() for sample in of.values()}
    (tmp_path / "own.csv").write_text(table)
    assert run("second", "--data.split", tmp_path / "own.csv") == (table, split)


def _hparams(run: Path) -> list[str]:
    names = []
    for events in run.rglob("events.out.tfevents.*"):
        names += list(EventAccumulator(str(events)).Reload().summary_metadata)
    return names


def test_learning_rate_follows_the_schedule(nuclei: Path, tmp_path: Path) -> None:
    args = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path, *SMALL)
    assert cellseg("fit", *args, "--trainer.max_epochs", 2, "--trainer.log_every_n_steps", 1) == 0
    rates = list(scalars(tmp_path, "train/lr").values())
    assert len(rates) == 8
    # Two steps of warm-up to 1e-3, then half a cosine over the other six.
    cosine = 1e-3 * (1 + np.cos(np.pi * np.arange(6) / 6)) / 2
    np.testing.assert_allclose(rates, [1e-3 / 3, 2e-3 / 3, *cosine], rtol=1e-5)


def test_fault_25_no_nuclei_at_all_trains_and_scores(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "empty"
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
        for number in range(3):
            value = np.full((40, 40), 9 if name == "images" else 0, np.uint8)
            Image.fromarray(value).save(root / name / f"{number}.png")
    run = tmp_path / "run"
    args = ("--data.root", root, "--trainer.default_root_dir", run, "--trainer.max_epochs", 2)
    assert cellseg("fit", *args, *SMALL) == 0
    assert "No nuclei to validate on" in capfd.readouterr().err
    assert np.isfinite(list(scalars(run, "val/dice").values())).all()
    assert find_checkpoint(run, "best").is_file()


def test_fault_29_no_logger_and_no_terminal(nuclei: Path, tmp_path: Path) -> None:
    args = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path / "run", *SMALL)
    assert cellseg("fit", *args, "--trainer.max_epochs", 1, "--trainer.logger", "false") == 0
    assert find_checkpoint(tmp_path / "run").is_file()


def test_without_validation_training_still_leaves_a_checkpoint(
    nuclei: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    args = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path, *SMALL)
    never = ("--trainer.max_epochs", 1, "--trainer.limit_val_batches", 0)
    assert cellseg("fit", *args, *never) == 0
    assert "No val/map was logged" in capfd.readouterr().err
    assert find_checkpoint(tmp_path).is_file()


def test_early_stopping_ends_a_run_that_no_longer_rises(
    nuclei: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    args = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path, *SMALL)
    stop = ("--early_stopping.patience", 1, "--early_stopping.min_delta", 2)
    assert cellseg("fit", *args, *stop, "--trainer.max_epochs", 50) == 0
    assert torch.load(find_checkpoint(tmp_path), weights_only=True)["epoch"] == 1
    said = capfd.readouterr().err
    assert re.search(r"196 steps are left: about \d+ min, or less", said)
    assert "Stopped at step 8: no better val/map in 1 validation;" in said
    more = ("--ckpt_path", "last", "--early_stopping.patience", 9, "--trainer.max_epochs", 4)
    assert cellseg("fit", *args, *more) == 0
    assert torch.load(find_checkpoint(tmp_path), weights_only=True)["epoch"] == 3
    assert "Stopped at" not in capfd.readouterr().err


def test_fault_30_a_killed_data_worker_is_known_where_lightning_wraps_its_end() -> None:
    def log() -> None:
        try:  # torch's handler of the signal may come in anywhere
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        except RuntimeError as error:
            raise ValueError("you tried to log 0.0 which is currently not supported") from error

    with pytest.raises(OutputError, match="a process that reads images was killed"), explained():
        log()


def test_fault_30_killed_data_worker_ends_the_run(nuclei: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "cellseg", "fit", "--data.root", str(nuclei)),
            *("--trainer.default_root_dir", str(tmp_path), "--trainer.max_epochs", "1000", *SMALL),
            *("--data.num_workers", "1"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    workers: list[str] = []
    # The loader's workers are the children that started last; wait for the first checkpoint.
    while time.monotonic() < deadline and not (workers and list(tmp_path.rglob("*.ckpt"))):
        time.sleep(0.3)
        listed = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False
        )
        workers = listed.stdout.split()
    for worker in workers:
        subprocess.run(["kill", "-KILL", worker], check=False)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "cellseg: error: a process that reads images was killed" in error


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_fault_28_two_processes(command: str, nuclei: Path, trained: Path, tmp_path: Path) -> None:
    devices = ("--config", "ddp.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", 2)
    if command == "fit":
        root = write_nuclei(tmp_path / "data", 8)
        split = tmp_path / "split.csv"
        sides = ["train"] * 4 + ["val"] * 3 + ["test"]
        rows = [f"n{number:02d},{side}" for number, side in enumerate(sides)]
        split.write_text("\n".join(["image_id,split", *rows]))
        run = tmp_path / "run"
        args = ("--data.root", root, "--data.split", split)
        done = run_process(
            *("fit", *args, *SMALL, *devices),
            *("--trainer.default_root_dir", run, "--trainer.max_epochs", 2),
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("Data: ") == 1
        # Three images on two processes: one is computed twice and must count once.
        last = find_checkpoint(run)
        args = ("validate", "--ckpt_path", last, *args, "--data.num_workers", 0)
        reports = []
        for name in ("one", "two"):
            folder = tmp_path / name
            validate = (*args, "--trainer.default_root_dir", folder, *DECODE)
            if name == "one":
                assert cellseg(*validate) == 0
            else:
                done = run_process(*validate, *devices)
                assert done.returncode == 0, done.stderr
            reports.append(json.loads((folder / "metrics.json").read_text()))
            assert len((folder / "metrics.csv").read_text().splitlines()) == 4
        for name, value in reports[0].items():
            if name.startswith("val/"):
                assert reports[1][name] == pytest.approx(value, abs=1e-6), name
        for name in ("val/loss", "val/dice", "val/map", "val/aji"):
            logged = list(scalars(run, name).values())
            assert reports[0][name] == pytest.approx(logged[-1], abs=1e-5), name
        return
    # Five files, one of them bad, then one: fewer than processes.
    for count, code in ((5, 1), (1, 0)):
        folder = tmp_path / f"images{count}"
        folder.mkdir()
        for path in sorted((nuclei / "images").iterdir())[: count - code]:
            (folder / path.name).write_bytes(path.read_bytes())
        if code:
            (folder / "bad.png").write_text("no image")
        out = {name: tmp_path / f"{name}{count}" for name in ("one", "two")}
        args = ("predict", "--ckpt_path", find_checkpoint(trained), "--data.predict_dir", folder)
        args = (*args, "--data.num_workers", 0)
        assert cellseg(*args, "--output.dir", out["one"]) == code
        done = run_process(*args, "--output.dir", out["two"], *devices)
        assert done.returncode == code, done.stderr
        names = {name: sorted(p.name for p in path.iterdir()) for name, path in out.items()}
        assert names["one"] == names["two"]
        of_the_run = {".cellseg", "objects.csv", "report.html", "run.json", "summary.csv"}
        assert len(names["one"]) == 2 * (count - code) + len(of_the_run)
        for name in names["one"]:
            if name not in of_the_run - {"objects.csv"}:
                assert (out["one"] / name).read_bytes() == (out["two"] / name).read_bytes()
        summaries = [(path / "summary.csv").read_text().splitlines() for path in out.values()]
        assert len(summaries[0]) == len(summaries[1]) == count + 1


@pytest.mark.slow
def test_one_validation_image_on_two_processes(nuclei: Path, tmp_path: Path) -> None:
    done = run_process(
        *("fit", "--data.root", nuclei, *SMALL, "--config", "ddp.yaml"),
        *("--trainer.accelerator", "cpu", "--trainer.devices", 2, "--trainer.max_epochs", 1),
        *("--trainer.default_root_dir", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert "sync_dist" not in done.stderr
    assert find_checkpoint(tmp_path, "best").is_file()


def test_fault_24_masks_that_do_not_fit_are_refused_or_named_before_training(
    nuclei: Path, tmp_path: Path, fails: Fails, capfd: pytest.CaptureFixture[str]
) -> None:
    root = write_nuclei(tmp_path / "data", 5)
    run = ("--data.root", root, "--trainer.default_root_dir", tmp_path / "run", *SMALL)
    (root / "masks" / "n01.png").unlink()
    assert cellseg("fit", *run, "--trainer.max_epochs", 1) == 0
    assert "Images without a mask are left out: images/n01.png" in capfd.readouterr().err
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(root / "masks" / "n02.png")
    line = fails("fit", *run)
    assert "masks/n02.png: 9 x 9 px, but its image images/n02.png has 64 x 64" in line


def test_one_callback_by_its_name_averages_the_weights(nuclei: Path, tmp_path: Path) -> None:
    data = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path)
    averaging = ("--trainer.callbacks", "EMAWeightAveraging", "--trainer.callbacks.decay", 0.9)
    assert cellseg("fit", *data, "--trainer.max_epochs", 1, *averaging, *SMALL) == 0
    content = torch.load(find_checkpoint(tmp_path), weights_only=True)
    average, current = content["state_dict"], content["current_model_state"]
    assert not torch.equal(average["net.head.weight"], current["net.head.weight"])
    again = ("--ckpt_path", "last", "--trainer.max_epochs", 2)
    assert cellseg("fit", *data, *again, *averaging, *SMALL) == 0


def test_the_precision_recall_curve_counts_pixels_from_each_threshold_on() -> None:
    rng = np.random.default_rng(0)
    images = [(rng.random((9, 7), np.float32), rng.random((9, 7)) < 0.3) for _ in range(3)]
    images.append((np.ones((2, 2), np.float32), np.ones((2, 2), bool)))
    images.append((np.full((1, 1), np.nan, np.float32), np.zeros((1, 1), bool)))
    dashboard, curves = Dashboard(images=0), {}
    trainer = SimpleNamespace(
        sanity_checking=False,
        current_epoch=1,
        max_epochs=9,
        num_val_batches=[len(images)],
        strategy=SimpleNamespace(reduce=lambda value, reduce_op: value),
        is_global_zero=True,
        logger=None,
        global_step=0,
    )
    task = SimpleNamespace(device="cpu")
    dashboard.on_validation_epoch_start(trainer, task)  # type: ignore[arg-type]
    for probs, target in images:
        outputs = {"probs": torch.from_numpy(probs)[None]}
        batch = {"labels": torch.from_numpy(target.astype(int))[None]}
        dashboard.on_validation_batch_end(trainer, task, outputs, batch, 0)  # type: ignore[arg-type]

    def add(tag: str, *counts: Any, **more: Any) -> None:
        names = ("tp", "fp", "tn", "fn", "precision", "recall")
        curves.update(zip(names, counts, strict=True))

    _add_pr_curve(SimpleNamespace(add_pr_curve_raw=add), dashboard._histogram, 0)
    every = np.nan_to_num(np.concatenate([probs.ravel() for probs, _ in images]))
    truth = np.concatenate([target.ravel() for _, target in images])
    for place, threshold in enumerate(np.linspace(0, 1, 101)):
        preds = every >= threshold - 1e-9
        assert curves["tp"][place] == (preds & truth).sum()
        assert curves["fp"][place] == (preds & ~truth).sum()
        assert curves["fn"][place] == (~preds & truth).sum()
        assert curves["recall"][place] == pytest.approx((preds & truth).sum() / truth.sum())
    assert curves["tp"][100] == 4


def test_of_equal_scores_the_first_is_the_best_as_its_checkpoint_is() -> None:
    dashboard = Dashboard(images=0)
    for dice, score in ((0.4, 0.0), (0.3, 0.0), (0.6, 0.2), (0.5, 0.2)):
        metrics = {"val/map": torch.tensor(score), "val/dice": torch.tensor(dice)}
        trainer = SimpleNamespace(callback_metrics=metrics, sanity_checking=False)
        dashboard.on_validation_end(trainer, SimpleNamespace())  # type: ignore[arg-type]
        best = 0.6 if score else 0.4
        assert dashboard._best["val/dice"] == pytest.approx(best)


def test_the_best_is_tuned_whatever_else_the_user_keeps(
    nuclei: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = {"dirpath": str(tmp_path / "own"), "monitor": "val/loss", "filename": "mine"}
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": own}
    (tmp_path / "own.yaml").write_text(json.dumps({"trainer": {"callbacks": [callback]}}))
    args = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path / "run", *SMALL)
    config = ("--config", tmp_path / "own.yaml", "--trainer.max_epochs", 1)
    assert cellseg("fit", *args, *config) == 0
    assert "Tuned on" in capfd.readouterr().err
    best = torch.load(find_checkpoint(tmp_path / "run", "best"), weights_only=True)
    mine = torch.load(tmp_path / "own" / "mine.ckpt", weights_only=True)
    assert "tuned" in best and "tuned" not in mine


def go_on_from_a_score_of_1(best: Path) -> None:
    """Makes a last checkpoint of the best one: nothing that follows is better."""
    content = torch.load(best, weights_only=True)
    (ours,) = (state for name, state in content["callbacks"].items() if "BestAndLast" in name)
    ours["best_model_score"] = torch.tensor(1.0)
    torch.save(content, best.with_name("last.ckpt"))


def test_a_run_that_was_moved_knows_its_best(
    nuclei: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ("--data.root", nuclei, *SMALL, "--tuning.images", 0)
    assert cellseg("fit", *args, "--trainer.max_epochs", 1) == 0
    best = find_checkpoint(tmp_path, "best")
    go_on_from_a_score_of_1(best)
    (tmp_path / "runs").rename(tmp_path / "moved")
    moved = ("--trainer.default_root_dir", "moved", "--ckpt_path", "last")
    assert cellseg("fit", *args, *moved, "--trainer.max_epochs", 2) == 0
    assert len([*tmp_path.rglob("best*.ckpt")]) == 1
    assert step_of(find_checkpoint(tmp_path / "moved", "best")) == 4  # nothing is better than 1


def test_a_run_that_saves_at_another_pace_knows_its_best(nuclei: Path, tmp_path: Path) -> None:
    args = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path, *SMALL)
    assert cellseg("fit", *args, "--trainer.max_epochs", 1, "--tuning.images", 0) == 0
    best = find_checkpoint(tmp_path, "best")
    go_on_from_a_score_of_1(best)
    more = ("--ckpt_path", "last", "--checkpoint.every_n_epochs", 2, "--trainer.max_epochs", 2)
    assert cellseg("fit", *args, *more) == 0
    assert [*tmp_path.rglob("best*.ckpt")] == [best]


def test_a_run_that_goes_on_from_another_run_leaves_it_alone(
    nuclei: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    args = ("--data.root", nuclei, *SMALL, "--tuning.images", 0, "--trainer.default_root_dir", ".")
    monkeypatch.chdir(tmp_path / "b")
    assert cellseg("fit", *args, "--trainer.max_epochs", 1) == 0
    other = find_checkpoint(tmp_path / "b")
    before = other.read_bytes()
    monkeypatch.chdir(tmp_path / "a")
    last = Path("../b") / other.relative_to(tmp_path / "b")
    assert cellseg("fit", *args, "--trainer.max_epochs", 2, "--ckpt_path", last) == 0
    assert other.read_bytes() == before
    assert step_of(find_checkpoint(tmp_path / "a")) == 8


@pytest.mark.parametrize("logger", ["true", "CSVLogger"])
def test_a_run_that_goes_on_knows_its_best_whatever_the_logger(
    logger: str, nuclei: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the default root is relative
    own = ("--trainer.logger.save_dir", "runs") if logger == "CSVLogger" else ()
    args = ("--data.root", nuclei, *SMALL, "--trainer.logger", logger, *own)
    assert cellseg("fit", *args, "--trainer.max_epochs", 1) == 0
    best = find_checkpoint(tmp_path, "best")
    go_on_from_a_score_of_1(best)
    before = best.read_bytes()
    more = ("--trainer.max_epochs", 2, "--ckpt_path", "last", "--tuning.images", 0)
    assert cellseg("fit", *args, *more) == 0
    assert [*tmp_path.rglob("best*.ckpt")] == [best]
    assert best.read_bytes() == before  # nothing is better than 1
    (config,) = tmp_path.rglob("config.yaml")
    assert "max_epochs: 1" in config.read_text()  # as it began
    assert step_of(find_checkpoint(tmp_path)) == 8


def test_a_copy_of_a_checkpoint_below_the_root_is_left_alone(nuclei: Path, tmp_path: Path) -> None:
    args = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path, *SMALL)
    assert cellseg("fit", *args, "--trainer.max_epochs", 1) == 0
    copy = tmp_path / "keep" / "last.ckpt"
    copy.parent.mkdir()
    shutil.copy(find_checkpoint(tmp_path), copy)
    before = copy.read_bytes()
    assert cellseg("fit", *args, "--trainer.max_epochs", 2, "--ckpt_path", copy) == 0
    assert [*copy.parent.iterdir()] == [copy]
    assert copy.read_bytes() == before
