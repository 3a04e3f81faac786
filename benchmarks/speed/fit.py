"""Row 3: what `cellseg fit` adds to the training steps.

The command trains as with `configs/nuclei.yaml`, its augmentation and loader process included, and
tells when each step ended; there is no validation. The bare loop is `fit_bare.py`, which keeps
freed memory as the command does; beside it, the same loop without that is told.
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np

from speed.figures import Figure, ratios
from speed.fit_bare import BATCH
from speed.processes import watch
from speed.setting import Setting
from speed.subjects import write_images
from speed.timing import in_turns

BARS = {16: 0.90, 32: 0.95}
IMAGES = {256: 16, 512: 8}
# Steps in which the loader fills its queue and sees each image first, and those that are timed.
BEFORE, TIMED = 3, {16: 10, 32: 4}


def measure(setting: Setting) -> list[Figure]:
    """A figure for each width."""
    folder = setting.folder / "fit"
    write_images(folder / "data", IMAGES, masks=True)
    figures = []
    for width, bar in BARS.items():
        steps = 1 if setting.quick else TIMED[width]
        fit, kept, plain = in_turns(
            setting.repeats,
            partial(run, folder, width, steps),
            partial(bare_loop, folder, width, steps, True),
            partial(bare_loop, folder, width, steps, False),
            warm_up=False,
        )
        for name, bare, least in (("", kept, bar), (", memory given back", plain, None)):
            rates = [BATCH / np.median(way) for way in (fit, bare)]
            note = "{:.1f} of {:.1f} crops/s".format(*rates)
            samples = ratios(bare, fit)
            figures.append(Figure(3, f"{width} channels{name}", samples, least, note=note))
    return figures


def bare_loop(folder: Path, width: int, steps: int, keep: bool) -> float:
    """Seconds of a step of the bare loop."""
    script = Path(__file__).with_name("fit_bare.py")
    command = [sys.executable, str(script), *map(str, (width, steps, int(keep)))]
    log = folder / "bare.txt"
    watch(command, log, lambda pid: 0.0, interval=0.5)
    return float(log.read_text().split()[-1])


def run(folder: Path, width: int, steps: int) -> float:
    """Seconds of a step of `cellseg fit`."""
    root = folder / f"{width}"
    shutil.rmtree(root, ignore_errors=True)
    script = Path(__file__).with_name("fit_clock.py")
    clock = folder / "clock.yaml"
    clock.write_text("trainer: {callbacks: [{class_path: __main__.Clock}]}")
    arguments = [
        *("fit", "--config", "nuclei.yaml", "--config", clock, "--model.base_channels", width),
        *("--data.root", folder / "data", "--trainer.default_root_dir", root),
        *("--trainer.accelerator", "cpu", "--trainer.limit_val_batches", 0),
        *("--trainer.max_steps", BEFORE + steps),
    ]
    command = [sys.executable, str(script), *map(str, arguments)]
    watch(command, folder / "log.txt", lambda pid: 0.0, interval=0.5)
    times = json.loads((root / "steps.json").read_text())
    return float(times[-1] - times[BEFORE - 1]) / steps
