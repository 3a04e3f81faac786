"""Intensities of any range made into 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cellseg.reading.padding import (
    Padding,
    find_padding,
    padding_in,
    without_flat_borders,
    without_padding,
)
from cellseg.reading.recording import LARGE, Array
from cellseg.reading.scale_bar import ScaleBar, find_bar, without_bar

# The least range of intensities, as a multiple of the noise. The percentiles 1 and 99.8 of nothing
# but normal noise are 5.2 of its standard deviations apart; of the Data Science Bowl's images, at
# least 25.
NOISE_RANGE = 12
# Values whose neighbours are looked at to know the noise; the part of the differences, at either
# end, that does not count: edges, and flat parts; and what the mean of the others is of normal
# noise, in its standard deviations.
NOISE_VALUES = 2**15
NOISE_TRIM = 0.1
NOISE_MEAN = 1.035
# The least range of an 8-bit image on a bright background, as a part of its high limit. Empty glass
# has .02; of the Data Science Bowl's stained and brightfield images, the least has .32.
LIT_RANGE = 0.1


class Limits(NamedTuple):
    """What is known of the intensities of an image.

    Attributes:
        low: What becomes 0.
        high: What becomes 1.
        padding: Its padding, which becomes background; None without any.
        bar: Its scale bar, likewise.
    """

    low: float
    high: float
    padding: Padding | None = None
    bar: ScaleBar | None = None


def intensity_limits(image: Array, percentiles: tuple[float, float]) -> Limits:
    """The two intensities that `normalise` maps to 0 and 1: percentiles of all channels.

    NaN and infinite pixels do not count, nor does what no microscope recorded: padding around
    the image, and a scale bar with the text beside it. One pair for the three channels keeps the
    colours of a stain apart. Of a large image every n-th pixel of every n-th row is looked at.
    They are no closer than a multiple of the noise, so that the noise of an empty field is not
    blown up into nuclei, nor are the shades of empty glass.

    Args:
        image: (H, W, C) or (P, H, W, C) of any type.
        percentiles: Low and high, in percent.

    Returns:
        The limits; low and high are both 0 where no pixel is finite.
    """
    step = sampling_step(image.shape[:-1])
    values = image[..., ::step, ::step, :]
    padding = find_padding(values)
    return limits_of(values, percentiles, noise_of(image, padding), padding, step)


def limits_of(
    values: Array,
    percentiles: tuple[float, float],
    noise: float,
    padding: Padding | None = None,
    step: int = 1,
) -> Limits:
    """As `intensity_limits`, of every n-th value (..., H, W, C) of an image.

    Args:
        values: Every `step`-th pixel of every `step`-th row.
        percentiles: Low and high, in percent.
        noise: From `noise_of`.
        padding: From `find_padding`.
        step: See `values`.
    """
    bar = None
    if not padding:
        values = without_flat_borders(values)
    padded = padding_in(values, padding) if padding else np.zeros(values.shape[:-1], bool)
    if values.dtype.kind != "f" or np.isfinite(values).all():
        if padding:
            background = np.asarray(padding.background, values.dtype)
            values = np.where(padded[..., None], background, values)
        bar = find_bar(values, step)
        if bar:
            values = without_bar(values, bar._replace(width=bar.width // step))
    if padding:
        values = values[~padded]
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    if values.size == 0:
        return Limits(0, 0)
    low, middle, high = np.percentile(values, (percentiles[0], 50, percentiles[1])).tolist()
    if values.dtype == np.uint8 and middle > 127 and high > low:  # lit through
        low = min(low, (1 - LIT_RANGE) * high)
    return Limits(low, max(high, low + NOISE_RANGE * noise), padding, bar)


def noise_of(image: Array, padding: Padding | None = None) -> float:
    """Standard deviation of the noise of (..., H, W, C), in its grey levels.

    From the differences of neighbours in as many rows as it takes, and in columns, whichever are
    the larger ones. Where there are more edges than plain parts, it is too large.
    """
    step = max(1, math.prod(image.shape) // NOISE_VALUES)
    across, down = (min(step, side) for side in image.shape[-3:-1])
    rows = image[..., across // 2 :: across, :, :]
    columns = image[..., down // 2 :: down, :].swapaxes(-2, -3)
    return max(_noise_along(rows, padding), _noise_along(columns, padding))


def _noise_along(rows: Array, padding: Padding | None) -> float:
    from scipy.stats import trim_mean

    rows = (rows if padding else without_flat_borders(rows)).astype(np.float64)
    if padding:
        rows[(rows == padding.value).all(axis=-1)] = np.nan
    with np.errstate(invalid="ignore"):  # infinite less infinite
        differences = np.abs(np.diff(rows, axis=-2)).ravel()
    differences = differences[np.isfinite(differences)]
    return float(trim_mean(differences, NOISE_TRIM)) / NOISE_MEAN if differences.size else 0.0


def sampling_step(shape: Sequence[int]) -> int:
    """Of every how many rows and columns one is enough to know the intensities of (..., H, W)."""
    return math.ceil(math.sqrt(max(1.0, math.prod(shape) / LARGE)))


def normalise(image: Array, limits: Limits) -> NDArray[np.float32]:
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
    low, span = limits.low, max(limits.high - limits.low, _least_span(limits, image.dtype))
    if limits.padding:
        image = without_padding(image, limits.padding)
    if limits.bar:
        image = without_bar(image, limits.bar)
    # Floating images in double precision, where the widest range of float32 does not overflow.
    wide = image.astype(np.float64 if image.dtype.kind == "f" else np.float32)
    scaled: Array = (np.clip(wide, low, low + span) - low) / span
    if image.dtype.kind == "f":
        np.nan_to_num(scaled, copy=False, nan=0.0)
    return np.asarray(scaled, np.float32)


def to_tensor(image: Array) -> torch.Tensor:
    """(H, W, 3) as a contiguous (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def note_on_contrast(limits: Limits, dtype: np.dtype[Any]) -> str:
    """A note on an image of so little contrast that `normalise` leaves some of it out; else "".

    Args:
        limits: From `intensity_limits`.
        dtype: Of the image.
    """
    if limits.high - limits.low >= _least_span(limits, dtype):
        return ""
    between = f"{limits.low:.7g} and {limits.high:.7g}"
    return f"hardly any contrast: nearly all values lie between {between}"


def note_on_holes(count: int) -> str:
    """A note on pixels that are no numbers."""
    return f"{count} NaN or infinite values were left out" if count else ""


def _least_span(limits: Limits, dtype: np.dtype[Any]) -> float:
    least = 1e-3 * max(abs(limits.low), abs(limits.high), 1e-30)
    return max(least, 1.0) if dtype.kind in "ui" else least
