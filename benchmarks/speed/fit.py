"""Row 3: what `cellseg fit` adds to the training steps.

The command trains as with `configs/nuclei.yaml`, its augmentation and loader process included, and
tells when each step ended; there is no validation. The bare loop is what a script would do on a
batch that is in memory: forward, the same loss, backward, AdamW in its fused form, nothing else.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from cellseg.task import SegmentationTask
from speed.figures import Figure, ratios
from speed.processes import watch
from speed.setting import Setting
from speed.subjects import write_images
from speed.timing import in_turns

BARS = {16: 0.90, 32: 0.95}
BATCH, CROP = 8, 256  # those of nuclei.yaml
IMAGES = {256: 16, 512: 8}
# Steps in which the loader fills its queue and sees each image first, and those that are timed.
BEFORE, TIMED = 2, {16: 5, 32: 3}


def measure(setting: Setting) -> list[Figure]:
    """A figure for each width."""
    folder = setting.folder / "fit"
    write_images(folder / "data", IMAGES, masks=True)
    figures = []
    for width, bar in BARS.items():
        steps = 1 if setting.quick else TIMED[width]
        bare, fit = in_turns(
            setting.repeats,
            bare_loop(width, steps),
            partial(run, folder, width, steps),
            warm_up=False,
        )
        rates = [BATCH / np.median(way) for way in (fit, bare)]
        note = "{:.1f} of {:.1f} crops/s".format(*rates)
        figures.append(Figure(3, f"{width} channels", ratios(bare, fit), bar, note=note))
    return figures


def bare_loop(width: int, steps: int) -> Callable[[], float]:
    """Gives the seconds of a step."""
    torch.manual_seed(0)
    task = SegmentationTask(out_channels=2, base_channels=width).train()
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-4, fused=True)
    image = torch.rand(BATCH, 3, CROP, CROP).contiguous(memory_format=torch.channels_last)
    target = (torch.rand(BATCH, 2, CROP, CROP) < 0.2).float()
    weight = torch.ones_like(target)

    def step() -> None:
        optimizer.zero_grad()
        task.loss(task.net(image), target, weight).backward()
        optimizer.step()

    def loop() -> float:
        step()  # the caches of the processor are not this loop's yet
        started = perf_counter()
        for _ in range(steps):
            step()
        return (perf_counter() - started) / steps

    return loop


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
