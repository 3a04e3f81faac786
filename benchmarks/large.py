"""Time and memory of `predict` on generated images of any size.

    python benchmarks/large.py OUT [SIDE ...] [--FLAG VALUE ...]

The flags are those of `predict`. Each image is a tiled grey TIFF with a nucleus in every
20 x 20 px. Printed are the time, what it would be if it grew with the area from the smallest image
on, and the peak of anonymous and shared memory over all processes above that of a predict of a tiny
image. Linux only.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

SIDES = (5000, 10_000, 20_000)
PITCH, RADIUS = 20, (4.5, 7.5)  # px
TILE = 640  # px, of which the pitch is a part


def patch(rng: np.random.Generator, side: int) -> NDArray[np.uint8]:
    """Ellipses, one in each cell of a grid, brighter or darker, blurred, with noise."""
    y, x = np.mgrid[:side, :side]
    row, column = y // PITCH, x // PITCH
    cells = (side // PITCH + 1,) * 2
    down, right = (rng.uniform(-3, 3, cells)[row, column] for _ in range(2))
    tall, wide = (rng.uniform(*RADIUS, cells)[row, column] for _ in range(2))
    dy, dx = (y % PITCH - PITCH / 2 - down) / tall, (x % PITCH - PITCH / 2 - right) / wide
    brightness = rng.uniform(60, 200, cells)[row, column] * (dy**2 + dx**2 < 1)
    noisy = gaussian_filter(brightness, 1) + 12 + rng.normal(0, 4, (side, side))
    return noisy.clip(0, 255).astype(np.uint8)


def write(path: Path, side: int) -> None:
    """An image that need not be held whole."""
    rng = np.random.default_rng(0)
    patches = [patch(rng, TILE) for _ in range(16)]

    def tiles() -> Iterator[NDArray[np.uint8]]:
        for top in range(0, side, TILE):
            for left in range(0, side, TILE):
                tile = patches[rng.integers(len(patches))]
                yield tile[: min(TILE, side - top), : min(TILE, side - left)]

    tifffile.imwrite(
        path, tiles(), shape=(side, side), dtype=np.uint8, tile=(TILE, TILE), compression="zlib",
        photometric="minisblack", bigtiff=True,
    )  # fmt: skip


def memory(pid: int) -> int:
    """Anonymous and shared memory of a process and its children, in bytes."""
    total = 0
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        for name in ("RssAnon", "RssShmem"):
            match = re.search(rf"{name}:\s+(\d+) kB", status)
            total += 1024 * int(match[1]) if match else 0
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(memory(int(c)) for c in (task / "children").read_text().split())
    except OSError:  # it has ended
        pass
    return total


def predict(source: Path, out: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """Peak memory in bytes and the row of the summary."""
    command = [sys.executable, "-m", "cellseg", "predict", "--data.predict_dir", str(source)]
    peak = 0
    process = subprocess.Popen([*command, "--output.dir", str(out), *flags])
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"predict ended with {process.returncode}")
    with (out / "summary.csv").open(newline="") as lines:
        return peak, next(csv.DictReader(lines))


def run(out: Path, sides: Sequence[int], flags: Sequence[str]) -> None:
    """Write, predict and print."""
    out.mkdir(parents=True, exist_ok=True)
    write(out / "64.tif", 64)
    flags = ("--output.overwrite", "true", *flags)
    start, _ = predict(out / "64.tif", out / "64", *flags)
    table = ["| side | nuclei | seconds | by area | GiB above start |", "|" + "--:|" * 5]
    rate = 0.0
    for side in sides:
        path = out / f"{side}.tif"
        if not path.exists():
            write(path, side)
        peak, row = predict(path, out / str(side), *flags)
        seconds = float(row["seconds"])
        rate = rate or seconds / side**2
        above = (peak - start) / 2**30
        table.append(
            f"| {side:,} | {int(row['nuclei']):,} | {seconds:.0f} | {rate * side**2:.0f} "
            f"| {above:.2f} |"
        )
        print("\n".join(table), flush=True)


if __name__ == "__main__":
    sides = [int(side) for side in takewhile(str.isdigit, sys.argv[2:])]
    run(Path(sys.argv[1]), sides or SIDES, sys.argv[2 + len(sides) :])
