"""What was measured, whether it is enough, and how that is told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

ROWS = {
    1: "network / matrix product",
    2: "network / predict",
    3: "fit / bare loop",
    4: "start / import lightning",
    5: "memory",
    6: "peer / network, 1,024 px, 16 channels",
    7: "accuracy of the fast paths",
}


@dataclass(frozen=True)
class Figure:
    """One number of the table.

    Attributes:
        row: A key of `ROWS`.
        name: What differs from the row's other figures.
        samples: Its value in each repeat.
        bar: What the median must reach; None where the figure is only told.
        at_most: Whether it must not exceed the bar, instead of reaching it.
        note: Absolute numbers.
        lacking: Why there is no value.
    """

    row: int
    name: str
    samples: tuple[float, ...] = ()
    bar: float | None = None
    at_most: bool = False
    note: str = ""
    lacking: str = ""

    @property
    def median(self) -> float:
        """Of the samples; NaN without any, which meets no bar."""
        return float(np.median(self.samples)) if self.samples else float("nan")

    @property
    def met(self) -> bool | None:
        """Whether it reaches its bar; None where it has none and is there."""
        if self.lacking or not self.samples:
            return False
        if self.bar is None:
            return None
        return self.median <= self.bar if self.at_most else self.median >= self.bar


def ratios(above: ArrayLike, below: ArrayLike) -> tuple[float, ...]:
    """What was measured side by side, one by the other, in each repeat."""
    return tuple(np.divide(above, below).tolist())


def rows_met(figures: Iterable[Figure]) -> list[int]:
    """The rows that were measured and of which no figure fails."""
    verdicts: dict[int, list[bool | None]] = {}
    for figure in figures:
        verdicts.setdefault(figure.row, []).append(figure.met)
    return sorted(row for row, all_met in verdicts.items() if False not in all_met)


def last_line(figures: Iterable[Figure]) -> str:
    """The verdict; a row that was not run is not met."""
    return f"rows met {len(rows_met(figures))} of {len(ROWS)}"


def table(figures: Iterable[Figure]) -> str:
    """All figures, in Markdown."""
    lines = [
        "| row | figure | median | min to max | bar | met | |",
        "|--:|---|--:|--:|--:|---|---|",
    ]
    seen = set()
    for figure in figures:
        if figure.row not in seen:
            lines.append(f"| **{figure.row}** | **{ROWS[figure.row]}** | | | | | |")
            seen.add(figure.row)
        lines.append(f"| {figure.row} | {figure.name} | {' | '.join(_cells(figure))} |")
    return "\n".join(lines)


def _cells(figure: Figure) -> list[str]:
    median = spread = bar = ""
    if figure.samples:
        median = f"{figure.median:.3g}"
        spread = f"{min(figure.samples):.3g} to {max(figure.samples):.3g}"
    if figure.bar is not None:
        bar = f"{'≤' if figure.at_most else '≥'} {figure.bar:g}"
    met = {True: "yes", False: "**no**", None: ""}[figure.met]
    return [median, spread, bar, met, figure.lacking or figure.note]


def as_json(figures: Iterable[Figure]) -> list[dict[str, Any]]:
    """All figures with their samples, for machines."""
    told = []
    for figure in figures:
        median = figure.median if figure.samples else None
        told.append({**asdict(figure), "median": median, "met": figure.met})
    return told
