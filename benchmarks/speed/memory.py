"""Row 5: the peak memory of `cellseg predict`, over the number and the size of its images.

The memory is that of all its processes, in which what they share counts once (the proportional set
size of Linux), read thirty times a second.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from speed.figures import Figure, ratios
from speed.processes import memory, watch
from speed.setting import Setting, command
from speed.subjects import write_images
from speed.timing import in_turns

FEW, MANY = 4, 32  # copies of an image of 512 px: others would have more nuclei
# px; the last is the largest image that is predicted whole. Megapixels double from one to the next.
SIDES = (1024, 1448, 2048)
# Memory is not the same twice: what counts as flat, and as linear.
FLAT, LINEAR = 1.05, 1.15


def measure(setting: Setting) -> list[Figure]:
    """One figure for the number and one for the size."""
    folder = setting.folder / "memory"
    (image,) = write_images(folder, {512: 1})
    for number in (FEW, MANY):
        (folder / f"{number}").mkdir()
        for copy in range(number):
            shutil.copy(image, folder / f"{number}" / f"{copy:03d}.png")
    sizes = [write_images(folder / f"{side}", {side: 1})[0] for side in SIDES]
    sources = (folder / f"{MANY}", folder / f"{FEW}", *sizes)
    peak_of(sources[1])()  # a runtime converts the network once
    many, few, *growing = in_turns(setting.repeats, *map(peak_of, sources), warm_up=False)
    areas = np.array([side**2 / 1e6 for side in SIDES])
    slopes = np.diff(growing, axis=0) / np.diff(areas)[:, None]  # bytes a megapixel, (2, repeats)
    peaks = [np.median(runs) / 2**20 for runs in (many, few, *growing)]
    return [
        Figure(
            5,
            f"{MANY} / {FEW} copies of an image",
            ratios(many, few),
            FLAT,
            at_most=True,
            note="{:,.0f} of {:,.0f} MiB".format(*peaks[:2]),
        ),
        Figure(
            5,
            "growth by a megapixel, {1:,} to {2:,} px / {0:,} to {1:,} px".format(*SIDES),
            ratios(slopes[1], slopes[0]),
            LINEAR,
            at_most=True,
            note="{:,.0f}, {:,.0f}, {:,.0f} MiB".format(*peaks[2:]),
        ),
    ]


def peak_of(source: Path) -> Callable[[], float]:
    """Gives the peak of predicting a folder or an image, in bytes."""

    def measured() -> float:
        results = source.parent / f"{source.stem}_results"
        shutil.rmtree(results, ignore_errors=True)
        arguments = ("predict", "--data.predict_dir", source, "--output.dir", results)
        log = source.parent / "log.txt"
        return max(value for _, value in watch(command(*arguments), log, memory, interval=0.03))

    return measured
