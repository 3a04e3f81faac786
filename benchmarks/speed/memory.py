"""Row 5: the peak memory of `cellseg predict`, over the number and the size of its images.

The memory is that of all its processes, in which what they share counts once (the proportional set
size of Linux), read ten times a second.
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

# Copies of an image of 256 px, since others would have more nuclei. Over the first fifty the queue
# of the loader and the allocators' reserves fill up.
STEADY, MANY = 64, 192
# px; the last is the largest image that is predicted whole. Megapixels double from one to the next.
SIDES = (1024, 1448, 2048)
# What counts as flat, and as linear, since the same run takes some percent more or less each time.
# An image's pixels in float32, 0.75 MiB, kept for each of the 128 that are more, would be 1.18.
FLAT, LINEAR = 1.10, 1.15


def measure(setting: Setting) -> list[Figure]:
    """One figure for the number and one for the size."""
    folder = setting.folder / "memory"
    (image,) = write_images(folder, {256: 1})
    for number in (STEADY, MANY):
        (folder / f"{number}").mkdir()
        for copy in range(number):
            shutil.copy(image, folder / f"{number}" / f"{copy:03d}.png")
    sizes = [write_images(folder / f"{side}", {side: 1})[0] for side in SIDES]
    sources = (*(folder / f"{number}" for number in (STEADY, MANY)), *sizes)
    peak_of(sources[0])()  # a runtime converts the network once
    steady, many, *growing = in_turns(setting.repeats, *map(peak_of, sources), warm_up=False)
    areas = np.array([side**2 / 1e6 for side in SIDES])
    slopes = np.diff(growing, axis=0) / np.diff(areas)[:, None]  # bytes a megapixel, (2, repeats)
    peaks = [np.median(runs) / 2**20 for runs in (steady, many, *growing)]
    return [
        Figure(
            5,
            f"{MANY} / {STEADY} copies of an image",
            ratios(many, steady),
            FLAT,
            at_most=True,
            note="{1:,.0f} of {0:,.0f} MiB".format(*peaks),
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
        return max(value for _, value in watch(command(*arguments), log, memory, interval=0.1))

    return measured
