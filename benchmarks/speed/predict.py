"""Row 2: what `cellseg predict` adds to the network.

The command runs as its user runs it, on a folder with images of three sizes, sorted by size. When
it was done with which image, its results tell: their time of change. So the start of the program,
which row 4 measures, is left out with the first image. The network alone runs in this process, on
the same pixels, as `cellseg.load` has it.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import torch
from numpy.typing import NDArray

import cellseg
from speed.figures import Figure, ratios
from speed.processes import cpu_seconds, watch
from speed.setting import Setting, command
from speed.subjects import model, tensor, write_images
from speed.timing import in_turns, milliseconds

# Of each size so many are timed, all in all as many pixels; and one more, at which a runtime
# prepares for the size.
COUNTS = {256: 64, 512: 16, 1024: 4}
WIDTHS = {16: 0.75, 32: 0.85}  # with the bar of all images together
OF_ONE_SIZE = 0.6
# The CPU seconds that may be spent outside of the network, by an image and by a megapixel.
CPU_IMAGE, CPU_MEGAPIXEL = 0.020, 0.35

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """Of the images of each size, in seconds.

    Attributes:
        wall: By the clock, of one image.
        cpu: Of all threads and processes, for one image.
        total: By the clock, of all images but the first, and the tables of the run.
    """

    wall: Floats
    cpu: Floats
    total: float


def measure(setting: Setting) -> list[Figure]:
    """The figures of both widths."""
    counts = {size: max(2, n // 8) for size, n in COUNTS.items()} if setting.quick else COUNTS
    folder = setting.folder / "predict"
    images = write_images(folder, {size: n + 1 for size, n in counts.items()})
    return [figure for width in WIDTHS for figure in _measure_width(setting, width, images, counts)]


def _measure_width(
    setting: Setting, width: int, images: Sequence[Path], counts: dict[int, int]
) -> list[Figure]:
    weights, results = model(width, setting.folder), setting.folder / "predict" / f"{width}"
    task = cellseg.load(weights).task
    # The network does not mind what it sees, so fewer tell as much.
    inputs = {
        size: [tensor(number, size) for number in range(min(n, max(4, n // 4)))]
        for size, n in counts.items()
    }
    network_alone(task, inputs)  # a runtime prepares for each size
    network, predict = in_turns(
        setting.repeats,
        lambda: network_alone(task, inputs),
        lambda: run(weights, images, results, counts),
        warm_up=False,  # the first image of each size is
    )
    # All images but the very first, as `Costs.total` counts them.
    numbers = np.array([n + 1 for n in counts.values()]) - np.eye(1, len(counts))[0]
    alone = [float(numbers @ one.wall) for one in network]
    name = f"{width} channels"
    everything = Figure(
        2,
        f"{name}, all sizes",
        ratios(alone, [one.total for one in predict]),
        WIDTHS[width],
        note=f"{len(images) - 1} images; {nuclei(results, images)} nuclei in an image",
    )
    walls = [np.array([one.wall for one in way]) for way in (network, predict)]
    outside = np.array([p.cpu - n.cpu for n, p in zip(network, predict, strict=True)])
    by_size = [
        Figure(
            2,
            f"{name}, {size:,} px",
            ratios(ours, theirs),
            OF_ONE_SIZE,
            note=f"{milliseconds(np.median(ours))} of {milliseconds(np.median(theirs))} an image",
        )
        for size, ours, theirs in zip(counts, walls[0].T, walls[1].T, strict=True)
    ]
    return [everything, *by_size, *_cpu_outside(width, list(counts), outside)]


def _cpu_outside(width: int, sizes: Sequence[int], spent: Floats) -> list[Figure]:
    """The CPU seconds (repeats, sizes) that an image takes besides the network.

    A wider network leaves the same work, of which less can be seen beside it: no bar there.
    """
    megapixels = np.square(sizes) / 1e6
    allowed = CPU_IMAGE + CPU_MEGAPIXEL * megapixels
    middle = np.median(spent, axis=0)
    slope, intercept = np.polyfit(megapixels, middle, 1)
    notes = [milliseconds(seconds) for seconds in middle]
    notes[-1] += f"; all sizes: {1000 * intercept:.0f} ms + {slope:.2f} s/Mpx"
    return [
        Figure(
            2,
            f"{width} channels, {size:,} px: CPU outside / (20 ms + 0.35 s/Mpx)",
            ratios(spent[:, place], allowed[place]),
            1.0 if width == min(WIDTHS) else None,
            at_most=True,
            note=notes[place],
        )
        for place, size in enumerate(sizes)
    ]


def network_alone(task: torch.nn.Module, inputs: dict[int, list[torch.Tensor]]) -> Costs:
    """The network on images in memory."""
    spent = []
    for images in inputs.values():
        wall, cpu = perf_counter(), process_time()
        with torch.inference_mode():
            for image in images:
                task(image)
        spent.append(((perf_counter() - wall) / len(images), (process_time() - cpu) / len(images)))
    wall_of_each, cpu_of_each = np.array(spent).T
    return Costs(wall_of_each, cpu_of_each, float(wall_of_each.sum()))


def run(weights: str, images: Sequence[Path], results: Path, counts: dict[int, int]) -> Costs:
    """`cellseg predict` from the first result of each size to the last one."""
    shutil.rmtree(results, ignore_errors=True)
    readings = watch(
        command(
            *("predict", "--ckpt_path", weights, "--data.predict_dir", images[0].parent),
            *("--output.dir", results, "--output.formats", "labels,overlay"),
            *("--data.diameter", "none"),  # else the network sees some of them twice
        ),
        results.parent / "log.txt",
        cpu_seconds,
    )
    moments, cpu = np.array(readings).T
    done = np.array([_finished(results, path.stem) for path in images])
    ends = np.cumsum([n + 1 for n in counts.values()]) - 1
    begins = ends - list(counts.values())
    used = np.interp(done, moments, cpu)
    number = np.array(list(counts.values()))
    return Costs(
        wall=(done[ends] - done[begins]) / number,
        cpu=(used[ends] - used[begins]) / number,
        total=(results / "run.json").stat().st_mtime - done[0],
    )


def _finished(results: Path, stem: str) -> float:
    """When the last result of an image was written."""
    names = (f"{stem}_labels.tif", f"{stem}_overlay.png")
    return max((results / name).stat().st_mtime for name in names)


def nuclei(results: Path, images: Sequence[Path]) -> str:
    """How many were found: that the work after the network is what it is in earnest."""
    with (results / "summary.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    if len(rows) != len(images) or any(row["status"] != "ok" for row in rows):
        raise RuntimeError(f"{results}: not all images were predicted")
    if any(row["message"] for row in rows):
        raise RuntimeError(f"{results}: an image was predicted twice, as its negative or rescaled")
    runtime = json.loads((results / "run.json").read_text())["runtime"]
    numbers = [int(row["nuclei"]) for row in rows]
    return f"{runtime}, {min(numbers)} to {max(numbers)}"
