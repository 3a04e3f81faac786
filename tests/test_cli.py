from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cellseg import __version__
from cellseg.arguments import EXAMPLES, bracket_lists
from cellseg.atomic import writing
from cellseg.checkpoint import write as write_checkpoint
from cellseg.choice import choose
from cellseg.cli import carry_out, main, set_up_logging
from cellseg.data.datamodule import NucleiDataModule
from cellseg.errors import InputError, OutputError
from cellseg.task import SegmentationTask
from cellseg.training.checkpoints import WholeCheckpoints
from conftest import SMALL, cellseg, find_checkpoint, run_process, write_nuclei

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
Fails = Callable[..., str]


def printed_config(capsys: pytest.CaptureFixture[str], *args: object) -> Any:
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main([*map(str, args), "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def stored(ckpt: Path) -> Any:
    return torch.load(ckpt, weights_only=True)


def test_version_is_printed_without_the_heavy_imports() -> None:
    code = (
        "import sys; from cellseg.cli import main; main(['--version']); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{__version__}\n"


def test_first_line_comes_before_the_heavy_imports() -> None:
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "cellseg", "predict", "--help"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    before = []
    for line in process.stderr:
        if line.startswith("cellseg "):
            break
        before.append(line)
    process.kill()
    process.wait()
    process.stderr.close()
    assert before
    assert not any("torch" in line or "lightning" in line for line in before)


def test_ctrl_c_during_the_imports_ends_at_once() -> None:
    code = """
import os, signal, sys
from importlib.abc import MetaPathFinder
from cellseg.cli import carry_out, main

class CtrlC(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "cellseg.application":
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                raise ImportError("as extension modules make of it")

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run with "&"
sys.meta_path.insert(0, CtrlC())
sys.exit(main(["predict", "--help"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.splitlines() == [f"cellseg {__version__}: predict …"]


@pytest.mark.parametrize("command", [[], *([name] for name in EXAMPLES)])
def test_help_at_every_level_starts_with_examples(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    text = capsys.readouterr().out
    for name in command or EXAMPLES:
        assert text.index(EXAMPLES[name]) < text.index("options:")


def test_every_flag_of_ours_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    from cellseg.application import Application

    for name in EXAMPLES:
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        flags = [word for word in text.split() if word.startswith(("--data.", "--model."))]
        assert len(flags) > (10 if name == "predict" else 20)
        for flag in flags:
            after = text.split(f" {flag} ", 1)[1].split(" (type:")[0]
            assert len(after.split()) > 3, flag
    assert Application.subcommands().keys() == EXAMPLES.keys()


def test_help_of_predict_is_of_predict(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["predict", "--help"])
    text = capsys.readouterr().out
    shown = set(re.findall(r"^  (--[\w.]+)", text, re.MULTILINE))
    assert shown >= {"--ckpt_path", "--data.predict_dir", "--output.formats", "--trainer.devices"}
    assert not shown & {"--model.lr", "--data.root", "--trainer.max_epochs", "--model", "--data"}
    assert "by default nuclei-1" in " ".join(text.split())
    # A config of a training has them all the same.
    hidden = printed_config(capsys, "predict", "--data.crop_size", 64, "--trainer.max_epochs", 3)
    assert (hidden["data"]["crop_size"], hidden["trainer"]["max_epochs"]) == (64, 3)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_parses(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    groups = yaml.safe_load(config.read_text())
    shown = printed_config(capsys, "predict" if "output" in groups else "fit", "--config", config)
    for group, values in groups.items():
        assert values.items() <= shown[group].items()


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_other_commands_take_the_config_of_a_training(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(printed_config(capsys, "fit", "--config", "nuclei.yaml")))
    shown = printed_config(capsys, command, "--config", config)
    assert shown["data"]["crop_size"] == 256
    assert "lr" in shown["model"] and "decode" in shown


def test_configs_overlay_each_other_and_flags_win(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["fit", "--config", "nuclei.yaml", "--config", "unet2015.yaml", "--data.batch_size", 3]
    shown = printed_config(capsys, *args)
    assert shown["model"]["base_channels"] == 64
    assert shown["data"]["batch_size"] == 3
    assert shown["trainer"]["gradient_clip_val"] == 1.0


def test_packaged_config_is_found_by_name_only_where_no_file_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for form in (["--config", "nuclei.yaml"], ["--config=nuclei.yaml"]):
        assert printed_config(capsys, "fit", *form)["model"]["base_channels"] == 16
    assert printed_config(capsys, "fit", "--config", "configs/nuclei.yaml")["model"]["lr"] == 0.002
    Path("nuclei.yaml").write_text("model: {base_channels: 5}")
    assert printed_config(capsys, "fit", "--config", "nuclei.yaml")["model"]["base_channels"] == 5


def test_a_config_that_is_not_in_its_folder_is_not_taken_from_the_package(fails: Fails) -> None:
    assert "my/nuclei.yaml" in fails("fit", "--config", "my/nuclei.yaml")


def test_lists_are_given_with_commas() -> None:
    args = ["--data.include", "*.png, b c.tif", "--data.percentiles=2,98", "--data.root", "a,b"]
    assert bracket_lists(args, {"data": NucleiDataModule}) == [
        *("--data.include", '["*.png", "b c.tif"]', "--data.percentiles=[2,98]"),
        *("--data.root", "a,b"),
    ]
    for value in ("[*a*,*b*]", "[a"):  # the parser says what is wrong with the first
        given = bracket_lists(["--data.include", value], {"data": NucleiDataModule})[1]
        assert given == (value if "," in value else f'["{value}"]')
    dates = bracket_lists(["--data.preds_dir", "2024-31-12"], {"data": NucleiDataModule})
    assert "2024-31-12" in dates[1]
    args = ["--data.include", "[ab]*.pn[g]", "--data.exclude", "[c]"]
    assert bracket_lists(args, {"data": NucleiDataModule}) == [
        *("--data.include", '["[ab]*.pn[g]"]', "--data.exclude", "[c]"),
    ]


def test_an_epoch_without_a_batch_is_refused(nuclei: Path, tmp_path: Path, fails: Fails) -> None:
    where = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path)
    line = fails("fit", *where, "--data.crops_per_epoch", 4, "--data.batch_size", 8)
    assert "--data.crops_per_epoch 4: no batch of 8" in line


@pytest.mark.parametrize("source", [".", "../cells"])
def test_results_go_beside_the_folder_by_default(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cells").mkdir()
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "cells" / "a.png")
    monkeypatch.chdir(tmp_path / "cells")
    assert cellseg("predict", "--data.predict_dir", source, "--data.num_workers", 0) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells", "cells_cellseg"]
    assert [path.name for path in (tmp_path / "cells").iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ckpt_path", ""), "--ckpt_path: the value is empty"),
        (("--data.cache_dir=",), "--data.cache_dir: the value is empty"),
        (("--data.diameter", "60px"), "data.diameter: must be a number or auto or none, not 60px"),
        (("--data.percentiles", "1"), "data.percentiles: must be a tuple with 2 elements, not [1]"),
        (("--trainer.max_epochs", "all"), "trainer.max_epochs: must be a whole number, not all"),
        (("--trainer.overfit_batches", 1), "--trainer.overfit_batches draws its own crops"),
        (("--trainer.devices", "foo"), "`devices`"),
        (("--ckpt_path", "x" * 300), "x…: File name too long"),
    ],
)
def test_flags_that_others_fail_at_are_refused(
    flags: tuple[object, ...], message: str, nuclei: Path, tmp_path: Path, fails: Fails
) -> None:
    args = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path)
    assert message in fails("fit", *args, *SMALL, *flags)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("data: {synthetic: 4}".encode("utf-16"), "a config that is not in UTF-8"),
        (b"", "a config holds groups of settings"),
        (b"data: [", "no YAML: while parsing"),
    ],
)
def test_fault_23_a_damaged_config_is_named(
    content: bytes, words: str, tmp_path: Path, fails: Fails
) -> None:
    (tmp_path / "good.yaml").write_text("data: {synthetic: 4}")
    (tmp_path / "run.yaml").write_bytes(content)
    line = fails("fit", "--config", tmp_path / "good.yaml", "--config", tmp_path / "run.yaml")
    assert f"{tmp_path / 'run.yaml'}: {words}" in line


def test_output_flags_exist_on_predict_only(fails: Fails) -> None:
    for command in ("fit", "validate", "test"):
        assert "output.dir" in fails(command, "--ckpt_path", "x", "--output.dir", "out")


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["some/images"], "cellseg predict --data.predict_dir some/images"),
        (["predict", "some/images"], "--data.predict_dir some/images"),
        (["fit", "some/images"], "--data.root some/images"),
        (["pedict"], "cellseg predict"),
        (["fit", "--model.base_chanels", "8"], "model.base_channels"),
        (["fit", "--trainer.max_epoch", "8"], "trainer.max_epochs"),
    ],
)
def test_wrong_words_get_the_nearest_right_one(args: list[str], hint: str, fails: Fails) -> None:
    assert f"id you mean {hint}?" in fails(*args)


def test_fault_23_config_with_foreign_objects_unknown_keys_and_typos(
    tmp_path: Path, fails: Fails
) -> None:
    config = tmp_path / "c.yaml"
    target = tmp_path / "executed"
    config.write_text(
        "trainer: {callbacks: [{class_path: os.system, init_args: "
        f"{{command: touch {target}}}}}]}}"
    )
    assert "os.system" in fails("fit", "--config", config)
    assert not target.exists()
    config.write_text("model: {base_chanels: 8}")
    assert "did you mean model.base_channels" in fails("fit", "--config", config)
    config.write_text("modell: {base_channels: 8}")
    assert "modell" in fails("fit", "--config", config)
    assert "did you mean model" in fails("fit", "--config", config, "--print_config")
    config.write_text("fit: {model: {base_channels: 8}}")
    assert "stand on top, without fit:" in fails("fit", "--config", config)
    config.write_text("model: {base_channels: wide}")
    line = fails("fit", "--config", config)
    assert "model.base_channels: must be a whole number, not wide" in line
    assert "nowhere.yaml" in fails("fit", "--config", "nowhere.yaml")


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_logger_whose_package_is_missing_is_told_in_few_words(
    tmp_path: Path, fails: Fails
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("{data: {synthetic: 3}, trainer: {logger: WandbLogger}}")
    line = fails("fit", "--config", config)
    assert line.startswith("cellseg: error: lightning.pytorch.loggers.WandbLogger: Requirement")
    assert line.endswith("pip install -U 'wandb>=0.12.10'`")


def test_a_class_refusing_its_arguments_is_a_usage_error(fails: Fails) -> None:
    assert "base_channels=0" in fails("fit", "--model.base_channels", "0")
    assert "dice_weight=0" in fails("fit", "--model.dice_weight", "0", "--model.bce_weight", "0")
    assert "percentiles" in fails("fit", "--data.percentiles", "60,40")
    assert "--data.augment" in fails("fit", "--data.augment", "-1")
    assert "--data.synthetic" in fails("fit", "--data.synthetic", "-3")
    assert "--dashboard.every_n_epochs" in fails("fit", "--dashboard.every_n_epochs", "0")


@pytest.mark.parametrize(
    ("command", "limit"),
    [("fit", "train"), ("validate", "val"), ("test", "test"), ("predict", "predict")],
)
def test_a_command_that_is_left_no_image_is_refused(
    command: str, limit: str, nuclei: Path, fails: Fails
) -> None:
    images = "--data.predict_dir" if command == "predict" else "--data.root"
    line = fails(command, images, nuclei, f"--trainer.limit_{limit}_batches", 0)
    assert f"--trainer.limit_{limit}_batches 0: leaves no image to {command}" in line


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("data: 5", "data: 5 is no group of settings"),
        ("data: [a]", "data: ['a'] is no group of settings"),
        ("seed_everything: -3", "--seed_everything -3: must be a number from 0"),
        ("data: {include: x.tif}", "data.include: must be a list: [a, b] in a config, a,b on"),
        ("data: {num_workers: -1}", "--data.num_workers must not be negative"),
        ("data: {augment: .nan}", "--data.augment nan: must not be negative"),
        ("data: {root: x, synthetic: 5}", "--data.synthetic takes the place of --data.root"),
        ("data: {fold: 2}", "--data.fold 2: of how many?"),
        ("data: {folds: 3, split: a.csv}", "--data.folds 3 and --data.split a.csv divide"),
        ("model: {lr: .inf}", "lr=inf"),
        ("model: {weight_decay: -1}", "weight_decay=-1"),
        ("tuning: {images: -1}", "--tuning.images -1: must not be negative"),
        ("checkpoint: {every_n_epochs: 0}", "--checkpoint.every_n_epochs 0: must be positive"),
        (
            "checkpoint: {monitor: val_loss}",
            "--checkpoint.monitor val_loss: no such value is logged",
        ),
        ("checkpoint: {monitor: val_loss}", "did you mean val/loss?"),
        ("early_stopping: {monitor: mAP}", "--early_stopping.monitor mAP: no such value is logged"),
        ("early_stopping: {monitor: mAP}", "did you mean val/map?"),
        ("checkpoint: {mode: min}", "val/map: needs --checkpoint.mode max"),
        ("checkpoint: {monitor: val/loss}", "val/loss: needs --checkpoint.mode min"),
        (
            "early_stopping: {monitor: val/loss}",
            "val/loss: needs --early_stopping.mode min",
        ),
        ("trainer: {accumulate_grad_batches: 0}", "--trainer.accumulate_grad_batches: must be 1"),
        ("trainer: {check_val_every_n_epoch: 0}", "--trainer.check_val_every_n_epoch: must be 1"),
        ("trainer: {val_check_interval: 0}", "--trainer.val_check_interval 0: must be more"),
        ("trainer: {enable_checkpointing: false}", "--trainer.enable_checkpointing false: fit"),
        ("trainer: {callbacks: mine.Own}", "trainer.callbacks: mine.Own is not of Lightning"),
        ("trainer: {callbacks: Own}", "trainer.callbacks: there is no class Own"),
        ("trainer: {accelerator: tpu}", "--trainer: Requirement 'torch_xla"),
        ("data: {preds_dir: [a, '']}", "--data.preds_dir: takes one folder"),
    ],
)
def test_values_of_the_wrong_kind_are_refused_by_name(
    config: str, words: str, tmp_path: Path, fails: Fails
) -> None:
    (tmp_path / "c.yaml").write_text(config)
    assert words in fails("fit", "--config", tmp_path / "c.yaml")


@pytest.mark.parametrize("command", ["fit", "test", "validate"])
def test_fault_16_a_root_that_cannot_be_written_is_named(
    command: str, nuclei: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "file"
    root.write_text("in the way")
    args = ("--data.root", nuclei, "--trainer.default_root_dir", root, "--data.num_workers", 0)
    assert cellseg(command, *args, *(SMALL if command == "fit" else ())) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"cellseg: error: {root}")
    assert "--trainer.default_root_dir names another place" in last
    assert root.read_text() == "in the way"


def test_a_path_with_spaces_is_named_whole(fails: Fails) -> None:
    assert "Did you mean --data.predict_dir 'my images'?" in fails("predict", "my images")
    line = fails("predict", "my images", "--output.dir", "out")
    assert "Did you mean --data.predict_dir 'my images'?" in line
    assert "cellseg predict --data.predict_dir 'my images'?" in fails("my images")


def test_fit_and_test_without_data_say_so(trained: Path, fails: Fails) -> None:
    assert "--data.root" in fails("fit")
    assert "--data.root" in fails("test", "--ckpt_path", find_checkpoint(trained))


@pytest.mark.slow
def test_own_classes_come_in_through_the_script_of_the_docs(nuclei: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
    script = tmp_path / "mine.py"
    script.write_text(page.split("```python\n")[1].split("```")[0])

    def run(command: str, *flags: object) -> str:
        where = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path / "run")
        done = subprocess.run(
            [sys.executable, script, command, *map(str, (*where, *flags))],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    fit = ("fit", *SMALL, "--trainer.callbacks", "__main__.MyCallback")
    assert "epoch 0: loss " in run(*fit, "--trainer.max_epochs", 1)
    assert "epoch 1: loss " in run(*fit, "--trainer.max_epochs", 2, "--ckpt_path", "last")
    state = torch.load(find_checkpoint(tmp_path / "run"), weights_only=True)["optimizer_states"]
    assert state[0]["param_groups"][0]["nesterov"]
    assert "mean AP" in run("test", "--ckpt_path", "best")


def test_the_run_keeps_its_config_and_writes_nowhere_else(
    nuclei: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    run = tmp_path / "run"
    args = ("--data.root", nuclei, "--trainer.default_root_dir", run)
    assert cellseg("fit", *args, "--trainer.max_epochs", 1, *SMALL) == 0
    saved = yaml.safe_load(next(run.rglob("config.yaml")).read_text())
    assert saved["model"]["base_channels"] == 4
    scored = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path / "scored")
    written = set(run.rglob("*"))
    assert cellseg("test", "--ckpt_path", find_checkpoint(run), *scored) == 0
    images = ("--data.predict_dir", nuclei / "images", "--output.dir", tmp_path / "out")
    assert cellseg("predict", "--ckpt_path", find_checkpoint(run), *images) == 0
    assert set(run.rglob("*")) == written
    assert list(here.iterdir()) == []


def test_first_line_names_data_count_and_split(
    nuclei: Path, trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for command in ("validate", "test"):
        args = ("--ckpt_path", find_checkpoint(trained), "--data.root", nuclei)
        assert cellseg(command, *args, "--data.num_workers", 0) == 0
        lines = capfd.readouterr().err.splitlines()
        line = next(line for line in lines if line.startswith("Data: "))
        assert str(nuclei) in line
        assert "12 images, train 10, val 1, test 1" in line


class TestPrecedence:
    """What the user gives wins over the checkpoint, and the checkpoint over a default."""

    def test_stored_architecture_needs_no_flag(
        self, trained: Path, nuclei: Path, tmp_path: Path
    ) -> None:
        args = ("--data.predict_dir", nuclei / "images", "--output.dir", tmp_path / "out")
        for ckpt in trained.rglob("*.ckpt"):
            assert cellseg("predict", "--ckpt_path", ckpt, *args) == 0

    def test_fault_22_weights_of_another_network_are_named(
        self, trained: Path, nuclei: Path, tmp_path: Path, fails: Fails
    ) -> None:
        content = stored(find_checkpoint(trained))
        del content["state_dict"]["net.head.bias"]
        content["state_dict"]["net.head.weight"] = torch.zeros(5, 4, 1, 1)
        torch.save(content, tmp_path / "other.ckpt")
        said = "other.ckpt: of another architecture: it differs in net.head.bias, net.head.weight"
        images = ("--data.predict_dir", nuclei / "images", "--output.dir", tmp_path / "out")
        assert said in fails("predict", "--ckpt_path", tmp_path / "other.ckpt", *images)
        for flag in ("--ckpt_path", "--model.weights"):
            assert said in fails("fit", flag, tmp_path / "other.ckpt", "--data.root", nuclei)

    @pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
    @pytest.mark.parametrize(
        ("flag", "value", "kept"),
        [
            ("--model.base_channels", "8", "4"),
            ("--model.depth", "2", "3"),
            ("--data.percentiles", "5,95", "1,99.8"),
        ],
    )
    def test_fault_22_contradicting_flag_is_refused_naming_both(
        self, command: str, flag: str, value: str, kept: str, trained: Path, fails: Fails
    ) -> None:
        line = fails(command, "--ckpt_path", find_checkpoint(trained), flag, value)
        assert f"{flag} {value}" in line
        assert f"trained with {kept}" in line

    def test_contradiction_in_a_config_is_refused_too(
        self, trained: Path, tmp_path: Path, fails: Fails
    ) -> None:
        config = tmp_path / "c.yaml"
        config.write_text("model: {base_channels: 16}")
        line = fails("predict", "--config", config, "--ckpt_path", find_checkpoint(trained))
        assert "base_channels 16" in line

    def test_flag_that_agrees_is_welcome(self, trained: Path, nuclei: Path) -> None:
        args = ("--model.base_channels", 4, "--data.percentiles", "1,99.8")
        ckpt = find_checkpoint(trained)
        assert cellseg("test", "--ckpt_path", ckpt, "--data.root", nuclei, *args) == 0

    def test_stored_normalisation_is_used_without_a_flag(
        self, trained: Path, nuclei: Path, tmp_path: Path
    ) -> None:
        content = stored(find_checkpoint(trained))
        content["datamodule_hyper_parameters"]["percentiles"] = [20.0, 70.0]
        # A setting of another version does no harm.
        content["hyper_parameters"]["renamed_since"] = 1
        torch.save(content, tmp_path / "m.ckpt")
        images = ("--data.predict_dir", nuclei / "images" / "n00.png")
        out = tmp_path / "out"
        code = cellseg("predict", "--ckpt_path", tmp_path / "m.ckpt", *images, "--output.dir", out)
        assert code == 0
        settings = json.loads((out / "run.json").read_text())["settings"]
        assert settings["data"]["percentiles"] == [20.0, 70.0]
        # Half of the pixels lie outside of such limits, so the overlay shows the stretch.
        shown = np.asarray(Image.open(out / "n00_overlay.png").convert("L"))
        assert ((shown == 0) | (shown == 255)).mean() > 0.25

    def test_other_flags_win_over_the_checkpoint_and_defaults_do_not(
        self, trained: Path, nuclei: Path, tmp_path: Path
    ) -> None:
        # A learning rate of one's own on resume: neither the stored setting nor the stored
        # state of the optimiser may bring the old one back.
        run = tmp_path / "run"
        args = ("--ckpt_path", find_checkpoint(trained), "--data.root", nuclei, *SMALL[6:])
        run_flags = ("--trainer.default_root_dir", run, "--trainer.max_epochs", 4)
        own = ("--model.lr", 0.5, "--model.weight_decay", 0.05)
        assert cellseg("fit", *args, *run_flags, *own) == 0
        last = stored(find_checkpoint(run))
        assert last["hyper_parameters"]["lr"] == 0.5
        assert last["hyper_parameters"]["warmup_steps"] == 2  # of the checkpoint, not 100
        assert last["lr_schedulers"][0]["base_lrs"] == [0.5, 0.5]
        groups = last["optimizer_states"][0]["param_groups"]
        assert groups[0]["initial_lr"] == 0.5
        assert [group["weight_decay"] for group in groups] == [0.05, 0]


class TestSplitOfTheCheckpoint:
    def data_line(self, capfd: pytest.CaptureFixture[str], *args: object) -> str:
        capfd.readouterr()
        assert cellseg(*args, "--data.num_workers", 0) == 0
        return capfd.readouterr().err

    def test_test_uses_it_whatever_the_default_would_be(
        self, trained: Path, nuclei: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        # Two more images change what a random split would choose, not what was trained on.
        write_nuclei(tmp_path, 14)
        text = self.data_line(
            capfd, "test", "--ckpt_path", find_checkpoint(trained), "--data.root", tmp_path
        )
        assert "14 images, train 10, val 1, test 1 (the checkpoint's split)" in text
        assert "Images that are not in the split are left out: n12, n13" in text

    def test_unknown_images_are_all_scored_even_under_known_names(
        self, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        write_nuclei(tmp_path, 3, start=40)
        for folder in ("images", "masks"):  # the names of training images
            for old, new in (("n40", "n00"), ("n41", "n01")):
                (tmp_path / folder / f"{old}.png").rename(tmp_path / folder / f"{new}.png")
        text = self.data_line(
            capfd, "test", "--ckpt_path", find_checkpoint(trained), "--data.root", tmp_path
        )
        assert "train 0, val 0, test 3" in text

    def test_renamed_training_images_are_not_scored(
        self, trained: Path, nuclei: Path, tmp_path: Path, fails: Fails
    ) -> None:
        train = stored(find_checkpoint(trained))["NucleiDataModule"]["split"]["train"].values()
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir()
            for number, name in enumerate(sorted(train)):
                source = nuclei / folder / f"{name}.png"
                (tmp_path / folder / f"new{number}.png").write_bytes(source.read_bytes())
        line = fails("test", "--ckpt_path", find_checkpoint(trained), "--data.root", tmp_path)
        assert "test side" in line

    def test_scoring_training_images_on_demand_is_said(
        self, trained: Path, nuclei: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        split = tmp_path / "split.csv"
        train = stored(find_checkpoint(trained))["NucleiDataModule"]["split"]["train"].values()
        rows = [f"{name},{'test' if name in train else 'train'}" for name in _ids(nuclei)]
        split.write_text("\n".join(["image_id,split", *rows]))
        text = self.data_line(
            capfd,
            *("test", "--ckpt_path", find_checkpoint(trained), "--data.root", nuclei),
            *("--data.split", split),
        )
        assert "Images to evaluate on were trained on" in text

    def test_copies_on_two_sides_are_said(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(5):  # of one image
            write_nuclei(tmp_path, 1)
            for folder in ("images", "masks"):
                copy = tmp_path / folder / f"copy{number}.png"
                (tmp_path / folder / "n00.png").rename(copy)
        monkeypatch.setattr(
            pl.Trainer, "fit", lambda self, datamodule, ckpt_path=None, **_: datamodule.setup("fit")
        )
        text = self.data_line(capfd, "fit", "--data.root", tmp_path)
        assert "Images to evaluate on were trained on, or are copies of such, so the " in text


def test_fit_says_what_it_does_without(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pl.Trainer, "fit", lambda *args, ckpt_path=None, **kwargs: None)
    assert cellseg("fit", "--data.synthetic", 6, "--data.test_dir", tmp_path) == 0
    assert "--data.test_dir and --data.preds_dir are for test" in capfd.readouterr().err


def _ids(root: Path) -> list[str]:
    return [path.stem for path in (root / "images").iterdir()]


def test_python_m_cellseg_is_the_same_program() -> None:
    done = run_process("--version")
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n")


def _deaf(started: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    started.set()
    time.sleep(600)


def test_a_command_that_is_interrupted_ends_the_processes_that_it_began() -> None:
    context = multiprocessing.get_context("fork")
    begun = []

    def work() -> int:
        started = context.Event()
        begun.append(context.Process(target=_deaf, args=(started,), daemon=True))
        begun[0].start()
        assert started.wait(60)
        raise KeyboardInterrupt

    assert carry_out(work) == 130
    assert not begun[0].is_alive()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OutputError("/scratch/torch_run/a.tif: no space left"), 1, "torch_run/a.tif: no space"),
        (InputError("/torch_1_2: no such file"), 2, "/torch_1_2: no such file"),
        (RuntimeError("unable to open </torch_12_345_0> in read-write mode"), 1, "was killed"),
    ],
)
def test_errors_for_people_are_told_as_they_are(
    error: Exception, code: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        raise error

    assert carry_out(work) == code
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("cellseg: error: ") and said in line


def test_what_lightning_itself_refuses_is_one_line(
    nuclei: Path, tmp_path: Path, fails: Fails
) -> None:
    args = ("--data.root", nuclei, "--trainer.default_root_dir", tmp_path, *SMALL)
    line = fails("fit", *args, "--trainer.val_check_interval", 300)
    assert "`val_check_interval` (300) must be less than or equal" in line


def test_a_datamodule_in_python_takes_paths_as_text(nuclei: Path, tmp_path: Path) -> None:
    datamodule = NucleiDataModule(root=str(nuclei), cache_dir=str(tmp_path))  # type: ignore[arg-type]
    assert len(datamodule.annotated()[1]) == 12


def test_a_mistake_in_a_task_of_ones_own_keeps_its_traceback(nuclei: Path, tmp_path: Path) -> None:
    class Mistaken(SegmentationTask):
        def training_step(self, batch: dict[str, Any]) -> torch.Tensor:
            self.log("mine", torch.ones(3))
            return super().training_step(batch)

    args = ["fit", "--data.root", nuclei, "--trainer.default_root_dir", tmp_path, *SMALL]
    with pytest.raises(ValueError, match="single element"):
        main(list(map(str, args)), model_class=Mistaken)


def test_what_a_task_of_ones_own_has_saved_is_restored(nuclei: Path, tmp_path: Path) -> None:
    restored: list[str] = []

    class Keeping(SegmentationTask):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            super().on_save_checkpoint(checkpoint)
            checkpoint["mine"] = 7

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            super().on_load_checkpoint(checkpoint)
            restored.append(f"{self.trainer.state.fn.value} {checkpoint['mine']}")  # type: ignore[union-attr]

    def run(*args: object) -> int:
        return main([*map(str, args), "--data.num_workers", "0"], model_class=Keeping)

    root = ("--trainer.default_root_dir", tmp_path / "run")
    small = [flag for flag in SMALL if flag not in ("--data.num_workers", "0")]
    assert run("fit", "--data.root", nuclei, *small, *root, "--trainer.max_epochs", 1) == 0
    for command in ("validate", "test", "predict"):
        data = ("--data.root", nuclei)
        if command == "predict":
            data = ("--data.predict_dir", nuclei / "images", "--output.dir", tmp_path / "out")
        assert run(command, *data, "--ckpt_path", "best", *root) == 0
    assert restored == ["validate 7", "test 7", "predict 7"]


class WeightedLoss(torch.nn.Module):
    """A loss that is called as docs/extending.md says, always."""

    def forward(self, logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, target, weight)


class OwnNetwork(SegmentationTask):
    """Another network and loss, and a schedule that has no base rates."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(base_channels=4, lr=lr)
        self.net = torch.nn.Conv2d(3, 2, 3, padding=1)  # type: ignore[assignment]
        self.loss = WeightedLoss()  # type: ignore[assignment]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, weight_decay=0.3)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        scheduler = {"scheduler": schedule, "monitor": "val/loss"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def test_a_network_and_a_schedule_of_ones_own_go_through_all_commands(
    nuclei: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(*args: object) -> int:
        return main([*map(str, args), "--data.num_workers", "0"], model_class=OwnNetwork)

    root = ("--trainer.default_root_dir", tmp_path / "run")
    small = ("--data.root", nuclei, "--data.crop_size", 64, "--data.crops_per_epoch", 8, *root)
    assert run("fit", *small, "--trainer.max_epochs", 1) == 0
    more = ("--ckpt_path", "last", "--trainer.max_epochs", 2, "--model.lr", 0.05)
    assert run("fit", *small, *more) == 0
    content = stored(find_checkpoint(tmp_path / "run", "last"))
    (group,) = content["optimizer_states"][0]["param_groups"]
    assert group["lr"] == pytest.approx(0.05)
    assert group["weight_decay"] == 0.3
    assert run("test", "--data.root", nuclei, "--ckpt_path", "best", *root) == 0
    found = ("--data.predict_dir", nuclei / "images", "--output.dir", tmp_path / "out")
    assert run("predict", *found, "--ckpt_path", "best", *root) == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["runtime"] == "torch"
    other = ("--predict.runtime", "openvino")
    assert run("predict", *found, "--ckpt_path", "best", *root, *other) == 2
    assert "--predict.runtime openvino computes the U-Net of cellseg" in capfd.readouterr().err


def test_a_network_without_buffers_is_kept_when_it_is_stopped(
    nuclei: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: SegmentationTask, *args: object) -> None:
        if self.global_step == 3:
            raise RuntimeError("stop")

    monkeypatch.setattr(OwnNetwork, "on_train_batch_end", stop)
    data = ("--data.root", nuclei, "--data.crop_size", 64, "--data.crops_per_epoch", 16)
    quiet = ("--data.batch_size", 4, "--trainer.enable_progress_bar", "false")  # which would stay
    args = (*data, *quiet, "--trainer.default_root_dir", tmp_path)
    with pytest.raises(RuntimeError, match="stop"):
        main([*map(str, ("fit", *args, "--data.num_workers", 0))], model_class=OwnNetwork)
    assert stored(find_checkpoint(tmp_path))["global_step"] == 3


def test_a_network_of_ones_own_does_not_start_from_weights_of_another(
    nuclei: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class OtherNetwork(SegmentationTask):
        def __init__(self, **more: Any) -> None:
            super().__init__(**more)
            self.net = torch.nn.Conv2d(3, 2, 3, padding=1)  # type: ignore[assignment]

    args = ["fit", "--data.root", nuclei, "--trainer.default_root_dir", tmp_path, *SMALL[4:]]
    weights = ["--model.weights", "nuclei-1", "--trainer.max_epochs", 1]
    assert main([*map(str, args + weights)], model_class=OtherNetwork) == 2
    assert "nuclei-1: of another architecture" in capfd.readouterr().err


def test_a_printed_config_has_what_the_model_brings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = printed_config(capsys, "fit", "--config", "finetune.yaml")
    assert printed["model"]["base_channels"] == 16
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(printed))
    again = printed_config(capsys, "fit", "--config", tmp_path / "mine.yaml")
    assert again["model"] == printed["model"]


def test_a_folder_named_like_a_model_is_not_taken_for_folds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nuclei-1").mkdir()
    monkeypatch.chdir(tmp_path)
    choice = choose("test", {}, "runs")
    assert choice is not None and choice.path.name == "nuclei-1.safetensors"


@pytest.mark.parametrize("config", [["--config", "nuclei.yaml"], ["--config=nuclei.yaml"]])
def test_a_flag_wins_over_a_config_that_stands_behind_it(
    config: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--data.batch_size", 2, "--model.lr", 0.5)
    with pytest.raises(SystemExit):
        cellseg("fit", *flags, *config, "--config", "ddp.yaml", "--print_config")
    shown = yaml.safe_load(capfd.readouterr().out)
    assert (shown["data"]["batch_size"], shown["model"]["lr"]) == (2, 0.5)
    assert (shown["data"]["augment_share"], shown["trainer"]["strategy"]) == (0.25, "ddp")


@contextmanager
def files_of_1000_bytes() -> Iterator[None]:
    """As on a disk that is nearly full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_checkpoints_that_lightning_saves_are_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"before")
    with files_of_1000_bytes(), pytest.raises(OutputError, match=r"last\.ckpt: cannot be written"):
        WholeCheckpoints().save_checkpoint({"weights": torch.zeros(10_000)}, path)
    assert path.read_bytes() == b"before" and [*tmp_path.iterdir()] == [path]


def test_weights_hold_no_training_to_go_on_with(fails: Fails) -> None:
    said = fails("fit", "--ckpt_path", "nuclei-1", "--data.synthetic", 9)
    assert "--model.weights nuclei-1 starts from it" in said


def test_the_innermost_file_that_cannot_be_written_is_the_one_that_is_named(tmp_path: Path) -> None:
    inner = tmp_path / "journal.jsonl"
    with pytest.raises(OutputError) as raised, writing(tmp_path / "table.csv"), writing(inner):
        raise OSError(errno.ENOSPC, "disk full")
    assert str(raised.value) == f"{inner}: cannot be written: disk full"


def test_a_checkpoint_that_cannot_be_written_stays_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt"
    path.write_bytes(b"before")
    with files_of_1000_bytes(), pytest.raises(OutputError, match=r"best\.ckpt: cannot be written"):
        write_checkpoint(path, {"weights": torch.zeros(10_000)})
    assert path.read_bytes() == b"before"
    assert [*tmp_path.iterdir()] == [path]


def test_messages_have_lines_of_their_own_beside_a_progress_bar(
    capfd: pytest.CaptureFixture[str],
) -> None:
    set_up_logging()
    with tqdm(total=3, desc="Half", ascii=True, file=sys.stderr, position=0) as bar:
        bar.update()
        logging.getLogger("cellseg.data").info("a word")
    before, after = capfd.readouterr().err.split("a word\n")
    assert before.split("\r")[-1].strip() == "" and "Half:" in before  # the bar was wiped
    assert "Half:" in after


def test_a_message_that_waits_for_a_bar_does_not_hold_up_others() -> None:
    set_up_logging()
    (handler,) = logging.getLogger("cellseg").handlers
    lane = Thread(target=logging.getLogger("cellseg").info, args=("of a lane",), daemon=True)
    assert handler.lock is not None
    with tqdm.get_lock():  # as within a bar, where Ctrl-C comes with a message of its own
        lane.start()
        time.sleep(0.3)
        assert handler.lock.acquire(timeout=5)
        handler.lock.release()
    lane.join()
