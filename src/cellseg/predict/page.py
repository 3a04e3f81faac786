"""`report.html`: a whole prediction run on one page, which needs only the overlays beside it."""

from __future__ import annotations

import hashlib
import os
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import Environment
from numpy.typing import NDArray

from cellseg.errors import counted

Counts = NDArray[np.integer[Any]]
Row = Mapping[str, Any]

# What the files beside the page contain.
CONTENTS = {
    "summary.csv": "one row per image or plane",
    "objects.csv": "one row per nucleus",
    "objects.parquet": "one row per nucleus",
    "rle.csv": "run lengths of the Data Science Bowl",
}
BARS = 40  # at most
# The axes end here where values twice as large would squeeze the rest.
MOST = 0.995
# px of the drawing: its size, and where the axes are.
WIDTH, HEIGHT = 400, 226
LEFT, RIGHT, TOP, BOTTOM = 64, 396, 26, 186


@dataclass(frozen=True)
class Bar:
    """One bar, in px of the drawing, and what it says when pointed at."""

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Histogram:
    """A histogram as the template draws it.

    Attributes:
        title: What is shown.
        axes: What stands at the horizontal and at the vertical axis.
        bars: From left to right.
        x_ticks: Position in px of the drawing, and number.
        y_ticks: As `x_ticks`.
        note: What is not drawn, or nothing.
    """

    title: str
    axes: tuple[str, str]
    bars: list[Bar]
    x_ticks: list[tuple[float, int]]
    y_ticks: list[tuple[float, int]]
    note: str


def write_page(
    path: Path,
    run: Mapping[str, Any],
    rows: Sequence[Row],
    diameters: Counts,
    shown: int,
    tables: Sequence[str],
) -> None:
    """Write a run as one HTML file that loads nothing and runs no script but its own.

    Args:
        path: Where to, in the folder of `run.json`.
        run: As in `run.json`: `command`, `version`, `model`, `model_sha256`, `settings` with
            the section `decode`, `seconds`.
        rows: As in `summary.csv`, one for each file and plane, in its order; also `unusual`, why
            the image is unlike the training data, and of those that are shown `overlay`, the
            overlay's path relative to the page, with slashes, and `thumbnail`, a small JPEG in
            base64. Each of the three may be empty.
        diameters: (D,) histogram of the nuclei of all images: entry d counts those whose
            equivalent diameter rounds to d px.
        shown: How many rows, and how many failures, are shown; the others are counted.
        tables: Names of the files beside the page that have more.

    Raises:
        OSError: The file cannot be written.
    """
    done = [row for row in rows if row["status"] == "ok"]
    failed = [row for row in rows if row["status"] != "ok"]
    stacks = any(row.get("plane", "") != "" for row in rows)
    unit = "plane" if stacks else "image"
    nuclei = np.array([int(row["nuclei"]) for row in done], np.int64)
    charts = []
    if len(done) > 1:
        axes = f"nuclei in one {unit}", f"number of {unit}s"
        charts.append(histogram(np.bincount(nuclei), f"Nuclei per {unit}", axes))
    if diameters.any():
        axes = "equivalent diameter (px)", f"nuclei in all {unit}s"
        charts.append(histogram(diameters, "Sizes of the nuclei", axes))

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"sha256": _sha256, "link": _link}
    template = environment.from_string(files(__package__).joinpath("page.html").read_text("utf-8"))
    text = template.render(
        run=run,
        written=datetime.now().astimezone(),
        duration=timedelta(seconds=round(float(run.get("seconds", 0)))),
        totals=_totals(done, nuclei, diameters, stacks),
        stacks=stacks,
        unit=unit,
        done=len(done),
        failed=len(failed),
        rows=done[:shown],
        failures=failed[:shown],
        tables=tables,
        contents=CONTENTS,
        charts=charts,
        size=(WIDTH, HEIGHT),
        area=(LEFT, RIGHT, TOP, BOTTOM),
    )
    # A name on disk need not be valid Unicode.
    path.write_text(text, encoding="utf-8", errors="replace", newline="")


def _totals(
    rows: Sequence[Row], nuclei: Counts, diameters: Counts, stacks: bool
) -> list[tuple[str, str]]:
    """Numbers, and what they are.

    Nuclei are not added up over the planes of a stack, in which one nucleus appears many times.
    """
    unit = "plane" if stacks else "image"
    totals = [_total(len({row["file"] for row in rows}), "images")]
    if stacks:
        totals.append(_total(len(rows), "planes"))
    elif rows:
        totals.append(_total(int(nuclei.sum()), "nuclei"))
    if len(rows) > 1:
        spread = f"{nuclei.min():,} to {nuclei.max():,}"
        totals.append((f"{np.median(nuclei):,.10g}", f"nuclei per {unit} (median; {spread})"))
    if diameters.any():
        middle = int(np.searchsorted(np.cumsum(diameters), diameters.sum() / 2))
        totals.append((f"{middle:,} px", "diameter of a nucleus (median)"))
    unusual = sum(bool(row.get("unusual")) for row in rows)
    if unusual:
        number, name = _total(unusual, f"{unit}s")
        totals.append((number, f"{name} unlike the training data"))
    return totals


def _total(number: int, things: str) -> tuple[str, str]:
    said, name = counted(number, things).split(" ")
    return said, name


def histogram(counts: Counts, title: str, axes: tuple[str, str]) -> Histogram:
    """Lay out a histogram of whole numbers from 0.

    Args:
        counts: (N,) how often each of 0..N-1 occurs; some does.
        title: What is shown.
        axes: What stands at the horizontal and at the vertical axis.
    """
    last, most = np.searchsorted(np.cumsum(counts), counts.sum() * np.array([1, MOST]))
    end = int(most if last > 2 * most else last) + 1
    step = _step(end, BARS)
    starts = np.arange(0, end, step)
    heights = np.add.reduceat(counts[: starts[-1] + step], starts)

    x_scale = (RIGHT - LEFT) / (len(starts) * step)
    y_step = _step(int(heights.max()), 4)
    y_end = -(-int(heights.max()) // y_step) * y_step
    y_scale = (BOTTOM - TOP) / y_end
    bars = []
    for start, height in zip(starts.tolist(), heights.tolist(), strict=True):
        values = f"{start:,}" if step == 1 else f"{start:,} to {start + step - 1:,}"
        pixels = height * y_scale
        bars.append(
            Bar(
                LEFT + start * x_scale + 0.5,
                BOTTOM - pixels,
                step * x_scale - 1,
                pixels,
                f"{axes[0]} {values}: {height:,}",
            )
        )
    larger = int(counts.sum() - heights.sum())
    return Histogram(
        title,
        axes,
        bars,
        # A number stands in the middle of its share of the axis.
        [(LEFT + (x + 0.5) * x_scale, x) for x in range(0, end, _step(end, 8))],
        [(BOTTOM - y * y_scale, y) for y in range(0, y_end + 1, y_step)],
        f"{larger:,} larger, up to {last:,}, not drawn" if larger else "",
    )


def _step(span: int, parts: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, … that divides a span into no more parts than these."""
    steps: Iterator[int] = (lead * 10**power for power in count() for lead in (1, 2, 5))
    return next(step for step in steps if step * parts >= span)


def _sha256(text: str) -> str:
    """A script or style as a Content-Security-Policy names it."""
    return f"sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _link(relative: str) -> str:
    return quote(os.fsencode(relative))
