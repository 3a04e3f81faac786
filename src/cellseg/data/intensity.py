"""Intensities of any range made into 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg.data.recording import Array
from cellseg.nn.unet import LARGE


def intensity_limits(image: Array, percentiles: tuple[float, float]) -> Array:
    """The two intensities that `normalise` maps to 0 and 1: percentiles of all channels.

    NaN and infinite pixels do not count. One pair for the three channels keeps the colours
    of a stain apart. Of a large image every n-th pixel of every n-th row is looked at.

    Args:
        image: (H, W, C) or (P, H, W, C) of any type.
        percentiles: Low and high, in percent.

    Returns:
        (2,) float64, low and high; both 0 where no pixel is finite.
    """
    step = sampling_step(image.shape[:-1])
    return limits_of(image[..., ::step, ::step, :], percentiles)


def limits_of(values: Array, percentiles: tuple[float, float]) -> Array:
    """As `intensity_limits`, of all values."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        values = values[np.isfinite(values)]
        if values.size == 0:
            return np.zeros(2)
    return np.percentile(values, percentiles)


def sampling_step(shape: Sequence[int]) -> int:
    """Of every how many rows and columns one is enough to know the intensities of (..., H, W)."""
    return math.ceil(math.sqrt(max(1.0, math.prod(shape) / LARGE)))


def normalise(image: Array, limits: Array) -> NDArray[np.float32]:
    """Intensities between the limits as [0, 1]; what lies outside is clipped.

    The range has a floor of one part in a thousand of the high limit (and of one grey level
    for integers): a black image with one hot pixel, or a constant one, stays black instead
    of having its noise blown up.

    Args:
        image: (..., H, W, C).
        limits: Of the whole image, from `intensity_limits`, also where `image` is a crop.

    Returns:
        (..., H, W, C) float32 in [0, 1]; NaN becomes 0.
    """
    low, high = (float(limit) for limit in limits)
    span = max(high - low, _least_span(limits, image.dtype))
    # Floating images in double precision, where the widest range of float32 does not overflow.
    wide = image.astype(np.float64 if image.dtype.kind == "f" else np.float32)
    scaled: Array = (np.clip(wide, low, low + span) - low) / span
    if image.dtype.kind == "f":
        np.nan_to_num(scaled, copy=False, nan=0.0)
    return np.asarray(scaled, np.float32)


def note_on_contrast(limits: Array, dtype: np.dtype[Any]) -> str:
    """A note on an image of so little contrast that `normalise` leaves some of it out; else "".

    Args:
        limits: (2,), from `intensity_limits`.
        dtype: Of the image.
    """
    low, high = (float(limit) for limit in limits)
    if high - low >= _least_span(limits, dtype):
        return ""
    return f"hardly any contrast: nearly all values lie between {low:.7g} and {high:.7g}"


def _least_span(limits: Array, dtype: np.dtype[Any]) -> float:
    least = 1e-3 * max(*(abs(float(limit)) for limit in limits), 1e-30)
    return max(least, 1.0) if dtype.kind in "ui" else least
