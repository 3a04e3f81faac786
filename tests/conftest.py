"""Small generated data, a model trained on it in seconds, and the command in two forms."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from cellseg.cli import main
from cellseg.data.synthetic import generate
from cellseg.reading.channels import to_rgb_planes
from cellseg.reading.images import read_one_plane

# The tests' arrays are tiny: threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

SHARED = Path(__file__).parents[2] / "shared"

# What makes a run small enough for a test.
SMALL = [
    *("--model.base_channels", "4", "--model.depth", "3", "--model.warmup_steps", "2"),
    *("--data.crop_size", "32", "--data.batch_size", "4", "--data.crops_per_epoch", "16"),
    *("--data.num_workers", "0", "--trainer.accelerator", "cpu"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
]


def write_nuclei(folder: Path, count: int, start: int = 0, size: int = 64) -> Path:
    """`count` generated images in images/ with label images in masks/."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        image, labels = generate(number, size=size)
        Image.fromarray(image).save(folder / "images" / f"n{number:02d}.png")
        Image.fromarray(labels.astype(np.uint16)).save(folder / "masks" / f"n{number:02d}.png")
    return folder


def read_image(source: Path | bytes, name: str = "", channel: str | None = None) -> NDArray[Any]:
    """An image as it is trained on, (H, W, 3)."""
    return np.asarray(to_rgb_planes(read_one_plane(source, name), channel)[0][0])


def find_checkpoint(run: Path, name: str = "last") -> Path:
    """The newest checkpoint of a run."""
    return max(run.rglob(f"{name}*.ckpt"), key=lambda path: path.stat().st_mtime)


def cellseg(*args: object) -> int:
    """The command in this process; its exit code."""
    return main([str(arg) for arg in args])


def run_process(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cellseg", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **env},
        check=False,
    )


@pytest.fixture(scope="session")
def nuclei(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve annotated images: ten to train on, one for validation, one for the test."""
    return write_nuclei(tmp_path_factory.mktemp("nuclei"), 12)


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for the tests, so that the user's stays as it is."""
    home = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(home)
    return home


@pytest.fixture(scope="session")
def trained(nuclei: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished small run."""
    run = tmp_path_factory.mktemp("trained")
    data = ("--data.root", nuclei, "--trainer.default_root_dir", run)
    assert cellseg("fit", *data, "--trainer.max_epochs", 2, *SMALL) == 0
    return run


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must exit with 2, and gives the one line that says why."""

    def run(*args: object) -> str:
        capfd.readouterr()
        assert cellseg(*args) == 2
        lines = capfd.readouterr().err.splitlines()
        assert not any(line.startswith("Traceback") for line in lines)
        assert lines[-1].startswith("cellseg: error: ")
        return lines[-1]

    return run
