"""What fills an image up where rotating, registering or stitching left nothing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellseg.reading.recording import Array

# The least part of the image's border that is padding, and of its area that is not.
LEAST_BORDER = 0.05
LEAST_INSIDE = 0.3
# Fewer pixels that are not padding may be one nucleus, or a few that touch, cut out onto black.
LEAST_PIXELS = 64 * 64
# At most this part of all else has its value too.
SCATTERED = 0.02
# How far beyond the values of all else it lies at least, as a part of the range of those.
GAP = 0.05
# The least part of all else that is in one piece.
ONE_PIECE = 0.9
# If less of an image than this part would be left, its flat borders stay.
LEAST_LEFT = 0.1


class Padding(NamedTuple):
    """The padding of an image.

    Attributes:
        value: Of its pixels, in each channel.
        background: Of the image, in each channel: the median of all else.
    """

    value: tuple[float, ...]
    background: tuple[float, ...]


def find_padding(values: Array) -> Padding | None:
    """The padding of (..., H, W, C), if there is any.

    That is a value at a corner which nothing else has or comes near to, and beside which all else
    is in one piece: so neither a black background is padding, nor one that someone set to 0.

    Args:
        values: The image, or every n-th pixel of every n-th row.
    """
    channels = values.shape[-1]
    sides = values[..., 0, :, :], values[..., -1, :, :], values[..., 0, :], values[..., -1, :]
    border = np.concatenate([side.reshape(-1, channels) for side in sides])
    corners = values[..., [0, 0, -1, -1], [0, -1, 0, -1], :].reshape(-1, channels)[:4]
    shares = [(border == corner).all(axis=-1).mean() for corner in corners]
    if max(shares) < LEAST_BORDER:  # as in most images: quick
        return None
    value = corners[int(np.argmax(shares))]
    same, padded = (values == value).all(axis=-1), _connected(values, value)
    inside = padded.size - padded.sum()
    if inside < max(LEAST_INSIDE * padded.size, LEAST_PIXELS):
        return None
    if same.sum() - padded.sum() > SCATTERED * inside:
        return None
    others = values[~same]
    others = others[np.isfinite(others).all(axis=-1)]
    if not len(others):
        return None
    low, background, high = np.percentile(others, (1, 50, 99), axis=0).astype(float)
    distance = np.maximum(low - value, value - high)
    if (distance <= GAP * (high - low)).all() or (high == low).all():
        return None
    if not _is_one_piece(~padded.reshape(-1, *padded.shape[-2:])[0]):
        return None
    return Padding(tuple(value.tolist()), tuple(background.tolist()))


def padding_in(image: Array, padding: Padding) -> NDArray[np.bool_]:
    """Which pixels (..., H, W) of an image, or of a part of it, are its padding."""
    return _connected(image, np.asarray(padding.value, image.dtype))


def without_padding(image: Array, padding: Padding) -> Array:
    """An image (..., H, W, C), or a part of it, with background where its padding is."""
    padded = padding_in(image, padding)
    if not padded.any():
        return image
    shown = image.copy()
    shown[padded] = padding.background
    return shown


def without_flat_borders(values: Array) -> Array:
    """Values (..., H, W, C) without the outer rows and columns that are all alike.

    Padding that has the value of the background, which may be 0, is seen in nothing else. Where
    hardly anything else would be left, as of a black image with hot pixels, they stay.
    """
    edges = values[..., 0, :, :], values[..., -1, :, :], values[..., 0, :], values[..., -1, :]
    if not any((edge == edge[..., :1, :]).all() for edge in edges):  # as of most images: quick
        return values
    rows = (values != values[..., :1, :]).any(axis=(-2, -1))
    inside: Array = values[..., _span(rows), :, :]
    columns = (inside != inside[..., :1, :, :]).any(axis=(-3, -1))
    inside = inside[..., _span(columns), :]
    return inside if inside.size >= LEAST_LEFT * values.size else values


def _span(varied: Array) -> slice:
    """From the first to the last place of (..., N) with a True; everything where there is none."""
    places = np.flatnonzero(varied.reshape(-1, varied.shape[-1]).any(axis=0))
    return slice(places[0], places[-1] + 1) if len(places) else slice(None)


def _connected(image: Array, value: Array) -> NDArray[np.bool_]:
    """Which pixels (..., H, W) have a value and are connected to the border by such pixels."""
    from scipy.ndimage import binary_propagation

    same: NDArray[np.bool_] = (image == value).all(axis=-1)
    border = same.copy()
    border[..., 1:-1, 1:-1] = False
    if not border.any():
        return border
    around = np.ones((1,) * (same.ndim - 2) + (3, 3))
    return np.asarray(binary_propagation(border, around, same))


def _is_one_piece(inside: NDArray[np.bool_]) -> bool:
    from skimage.measure import label

    sizes = np.bincount(label(inside).ravel())[1:]
    return bool(sizes.size and sizes.max() >= ONE_PIECE * sizes.sum())
