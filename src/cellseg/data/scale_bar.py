"""A scale bar that someone drew into an image, and the text beside it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from cellseg.data.recording import Array

# A scale bar: its part of the image with the text beside it, by how much it exceeds all else as a
# part of the range of that, its length in px and as a multiple of its width.
SHARES = (5e-4, 0.05)
GAP = 0.5
LENGTH = 20
RATIO = 4
# How far in px smoothed letters reach beyond what has the bar's value.
EDGE = 2


def bar_value(values: Array) -> float:
    """The value in (..., H, W, C) of a scale bar; infinite where there is none.

    That is a rectangle of one value far above all others. Whatever else has the value counts as
    text beside the bar; nuclei that are as flat and bright are no rectangles.
    """
    highest = values.max()
    drawn = (values == highest).all(axis=-1)
    if not SHARES[0] < drawn.mean() < SHARES[1]:
        return math.inf
    from skimage.measure import label, regionprops

    low, high, next_highest = np.percentile(values[~drawn], (1, 99, 99.9)).astype(float)
    if high == low or float(highest) - next_highest <= GAP * (high - low):
        return math.inf
    for plane in drawn.reshape(-1, *drawn.shape[-2:]):
        for region in regionprops(label(plane)):
            sides = sorted(np.subtract(region.bbox[2:], region.bbox[:2]).tolist())
            if region.extent == 1 and sides[1] >= max(LENGTH, RATIO * sides[0]):
                return float(highest)
    return math.inf


def of_bar(image: Array, value: float) -> NDArray[np.bool_]:
    """Which pixels (..., H, W) of an image (..., H, W, C) are a bar's, or at the edge of it.

    Args:
        image: The whole, or a part of it.
        value: From `bar_value` of the whole.
    """
    from scipy.ndimage import maximum_filter

    drawn = (image >= value).all(axis=-1)
    edge = 2 * EDGE + 1
    return np.asarray(maximum_filter(drawn, (1,) * (drawn.ndim - 2) + (edge, edge)))
