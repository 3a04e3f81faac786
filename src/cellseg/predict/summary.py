"""What the summary and the report say of the nuclei of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg.data.about import About
from cellseg.instances import equivalent_diameter
from cellseg.predict.measure import header_names

Array = NDArray[Any]

# The confidence of no validation image of nuclei-1 is lower, see `docs/outputs.md`.
UNSURE = 0.85
# Grainy nuclei that are much too large for the model fall to pieces, which tell no diameter.
UNUSUAL = f"confidence below {UNSURE:g}; where nuclei are in pieces, give their --data.diameter"
# Where so many nuclei, and such a part of them, have the highest value of all, it is a limit.
SATURATED = 3, 0.05
# The columns that tell so, each with the name of a channel after it.
INTENSITIES = ("min_", "mean_", "max_")


def summary_row(
    about: About,
    place: int,
    shape: Sequence[int],
    areas: Array,
    confidence: float | None,
) -> dict[str, Any]:
    """The row of one plane, of shape (H, W); its confidence is None without nuclei."""
    median = float(np.median(areas)) if len(areas) else 0.0
    unsure = confidence is not None and confidence < UNSURE
    return {
        "file": about.file,
        "plane": about.plane_names[place],
        "status": "ok",
        "height": shape[0],
        "width": shape[1],
        "scale": f"{about.scale:.3g}",
        "nuclei": len(areas),
        "median_area_px": f"{median:g}" if len(areas) else "",
        "median_diameter_px": f"{equivalent_diameter(median):.1f}" if len(areas) else "",
        "confidence": "" if confidence is None else f"{confidence:.3f}",
        "unusual": UNUSUAL if unsure else "",
        "message": about.note,
    }


def note_on_saturation(intensities: Sequence[Mapping[str, Array]], about: About) -> str:
    """A note on channels whose highest value is a limit that many nuclei reach; else "".

    Args:
        intensities: The `INTENSITIES` of the nuclei, part by part.
        about: Their image. Of colours of one picture nothing is said: few people measure them.
    """
    if about.colour or not intensities:
        return ""
    notes = []
    for channel, name in zip(about.channels, header_names(about.channels), strict=True):
        low, mean, high = (
            np.concatenate([part[kind + name] for part in intensities]) for kind in INTENSITIES
        )
        most = np.nanmax(high, initial=-np.inf)
        # What is darker than its surroundings has their values at its border.
        count = np.count_nonzero((high == most) & (2 * mean >= low + high))
        if count >= max(SATURATED[0], SATURATED[1] * len(high)):
            notes.append(
                f"saturated: {count} of {len(high)} nuclei reach {most:g}, the highest value of "
                f"channel {channel}"
            )
    return "; ".join(notes)


def diameter_counts(areas: Sequence[Array]) -> list[int]:
    """How many nuclei have an equivalent diameter that rounds to 0, 1, 2, … px."""
    diameters = equivalent_diameter(np.concatenate(areas))
    counts: list[int] = np.bincount(np.rint(diameters).astype(int)).tolist()
    return counts
