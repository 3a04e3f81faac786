"""A scale bar that someone drew into an image, and the text beside it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellseg.reading.recording import Array

# A scale bar: its part of the image with the text beside it, by how much it exceeds all else as a
# part of the range of that, its length in px and as a multiple of its width.
SHARES = (5e-4, 0.05)
GAP = 0.5
LENGTH = 20
RATIO = 4
# How far in px smoothed letters reach beyond what has the bar's value.
EDGE = 2


class ScaleBar(NamedTuple):
    """The scale bar of an image.

    Attributes:
        value: Of its pixels, in all channels.
        width: In px.
        background: Of the image, in each channel: the median.
    """

    value: float
    width: int
    background: tuple[float, ...]


def find_bar(values: Array, step: int = 1) -> ScaleBar | None:
    """The scale bar in (..., H, W, C), if there is one.

    That is a rectangle of one value far above all others; nuclei that are as flat and bright are no
    rectangles.

    Args:
        values: The image, or every `step`-th pixel of every `step`-th row.
        step: See `values`.
    """
    highest = values.max()
    drawn = (values == highest).all(axis=-1)
    if not SHARES[0] < drawn.mean() < SHARES[1]:
        return None
    from skimage.measure import label, regionprops

    others: Array = values[~drawn]
    low, high, next_highest = np.percentile(others, (1, 99, 99.9)).astype(float)
    if high == low or float(highest) - next_highest <= GAP * (high - low):
        return None
    for plane in drawn.reshape(-1, *drawn.shape[-2:]):
        for region in regionprops(label(plane)):
            sides = sorted(np.subtract(region.bbox[2:], region.bbox[:2]).tolist())
            if region.extent == 1 and sides[1] >= max(LENGTH, RATIO * sides[0]):
                background = np.median(others, axis=0).tolist()
                return ScaleBar(float(highest), sides[0] * step, tuple(background))
    return None


def without_bar(image: Array, bar: ScaleBar) -> Array:
    """An image (..., H, W, C), or a part of it, with background where a bar and its text are.

    What has the bar's value and is thicker than the bar is no text: a saturated nucleus.
    """
    drawn = np.asarray((image >= bar.value).all(axis=-1))
    if not drawn.any():
        return image
    shown = image.copy()
    for place in np.ndindex(drawn.shape[:-2]):
        shown[place][_thin(drawn[place], bar.width)] = bar.background
    return shown


def _thin(drawn: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """Which pixels (H, W) are of shapes that are no thicker than this, or at their edges."""
    from scipy.ndimage import binary_dilation, binary_opening, binary_propagation

    around = np.ones((3, 3), bool)
    thick = binary_opening(drawn, np.ones((width + 2, width + 2), bool))
    thin = drawn & ~binary_propagation(thick, around, drawn)
    thin = binary_dilation(thin, around, EDGE) & ~binary_dilation(thick, around, EDGE)
    return np.asarray(thin)
