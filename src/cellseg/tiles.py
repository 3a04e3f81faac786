"""Nuclei of a plane that is too large for the network: cut into tiles, and stitched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg.instances import Decoding, decode

Array = NDArray[Any]
Maps = Callable[[slice, slice], NDArray[np.float32]]

# Side in px of a tile.
TILE = 1024
# How far a nucleus may reach out of the tile that finds it, in px of what the network sees.
MARGIN = 128


@dataclass(frozen=True)
class Piece:
    """The nuclei that one tile has found, in a window around it.

    Attributes:
        rows: Of the window.
        columns: Of the window.
        labels: (h, w): 1 to `count` are the tile's nuclei, `count + 1` are all others.
        count: Number of its nuclei.
        first: The label that its first one has in the plane.
        probs: (h, w) foreground probability.
    """

    rows: slice
    columns: slice
    labels: NDArray[np.uint32]
    count: int
    first: int
    probs: NDArray[np.float32]


def stitch(
    shape: tuple[int, int],
    maps: Maps,
    decoding: Decoding,
    margin: int,
    found: Callable[[Piece], None],
) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.float32]]]:
    """The labels of a plane, from top to bottom in strips of its full width.

    Each tile is decoded with a margin around it. It takes all nuclei of which it has a pixel and
    that no earlier tile has taken, each of them whole: so none is cut, lost or taken twice.

    Args:
        shape: (H, W) of the plane.
        maps: Gives the maps (C, h, w) of some rows and columns.
        decoding: How they become nuclei.
        margin: From `margin_for`.
        found: Called with each tile's nuclei.

    Yields:
        Labels (h, W) from 1, and foreground probabilities (h, W); changed afterwards.
    """
    height, width = shape
    # What later tiles need and may still change, from the row `top` on.
    top, count = 0, 0
    labels = np.zeros((min(margin + 2 * TILE, height), width), np.uint32)
    probs = _below(labels.shape, None, 0, maps, slice(0, min(TILE, height)))
    for band in parts(slice(0, height), TILE):
        start, end = band.start, band.stop
        if end < height:
            _below(labels.shape, probs, end - top, maps, slice(end, min(end + TILE, height)))
        rows = slice(max(start - margin, 0), min(end + margin, height))
        held = slice(rows.start - top, rows.stop - top)
        for part in parts(slice(0, width), TILE):
            columns = slice(max(part.start - margin, 0), min(part.stop + margin, width))
            window = probs[:, held, columns]
            nuclei = decode(window, replace(decoding, exclude_border=False))
            if decoding.exclude_border:
                nuclei = _off_the_border(nuclei, rows, columns, shape)
            tile = _within(band, rows), _within(part, columns)
            taken = labels[held, columns]
            own = _own(nuclei, taken, tile, decoding.min_area)
            number = int(own.max())
            others = (own == 0) & ((taken > 0) | (nuclei > 0))
            piece = np.where(others, np.uint32(number + 1), own)
            found(Piece(rows, columns, piece, number, count + 1, window[0]))
            taken[own > 0] = own[own > 0] + np.uint32(count)
            count += number
        done = (height if end == height else end - margin) - top
        if done:
            yield labels[:done], probs[0, :done]
        for held_rows in (*probs, labels):
            for row in range(len(labels) - done):  # in place: all of them at once are large
                held_rows[row] = held_rows[row + done]
        labels[len(labels) - done :] = 0
        top += done


def parts(whole: slice, side: int) -> Iterator[slice]:
    """A range of rows or columns in parts of equal length, of which the last may be shorter."""
    for start in range(whole.start, whole.stop, side):
        yield slice(start, min(start + side, whole.stop))


def _within(part: slice, around: slice) -> slice:
    """Where a part lies in the range around it."""
    return slice(part.start - around.start, part.stop - around.start)


def margin_for(scale: float) -> int:
    """How far nuclei may reach out of a tile, in px, where the network sees them enlarged.

    At most one tile, since only the next row of tiles is in memory.
    """
    return min(TILE, round(MARGIN / min(1, scale)))


def _below(
    shape: tuple[int, int],
    held: NDArray[np.float32] | None,
    top: int,
    maps: Maps,
    rows: slice,
) -> NDArray[np.float32]:
    """Put the maps of a row of tiles below those that are held.

    Args:
        shape: (h, W) of what can be held.
        held: (C, h, W); made where there is none yet.
        top: Where they go.
        maps: See `stitch`.
        rows: Theirs in the plane.
    """
    for columns in parts(slice(0, shape[1]), TILE):
        tile = maps(rows, columns)
        if held is None:
            held = np.zeros((len(tile), *shape), np.float32)
        held[:, top : top + tile.shape[1], columns] = tile
    assert held is not None
    return held


def _own(
    nuclei: Array, taken: Array, tile: tuple[slice, slice], min_area: int
) -> NDArray[np.uint32]:
    """The nuclei of a tile, from 1.

    Args:
        nuclei: Labels of the window around it.
        taken: What earlier tiles have taken of the window.
        tile: Where it is in the window.
        min_area: Smaller ones are dropped.
    """
    free = taken == 0
    size = int(nuclei.max(initial=0)) + 1
    inside = np.bincount(nuclei[tile].ravel(), minlength=size)
    inside_free = np.bincount(nuclei[tile][free[tile]], minlength=size)
    # What another tile has taken may look a little larger from here.
    new = (2 * inside_free > inside) & (np.bincount(nuclei[free], minlength=size) >= min_area)
    new[0] = False
    numbers = np.cumsum(new, dtype=np.uint32) * new
    return np.where(free, numbers[nuclei], np.uint32(0))


def _off_the_border(nuclei: Array, rows: slice, columns: slice, shape: tuple[int, int]) -> Array:
    """Labels of a window without those that touch the border of the plane."""
    from skimage.segmentation import clear_border

    inside = np.ones(nuclei.shape, bool)
    inside[0] &= rows.start > 0
    inside[-1] &= rows.stop < shape[0]
    inside[:, 0] &= columns.start > 0
    inside[:, -1] &= columns.stop < shape[1]
    return np.asarray(clear_border(nuclei, mask=inside))


def with_halo(maps: Maps, shape: tuple[int, int], scale: float, depth: int) -> Maps:
    """Maps as they are in the whole plane, made of those of windows.

    What the U-Net pools together is a step of `2**depth` px: only windows that start at multiples
    of it give the same maps, and those of a pixel depend on the image up to 7 steps less 5 px away.

    Args:
        maps: The network's, of a window and nothing around it.
        shape: (H, W) of the plane.
        scale: By which the network sees it enlarged; the windows are smaller then.
        depth: Number of the U-Net's poolings.
    """
    step = 2**depth
    grid = max(step, round(step / scale))  # its multiples in px of the plane
    side = max(step, int(TILE / max(1, scale)) // step * step)
    halo = math.ceil(7 / scale) * step

    def around(part: slice, size: int) -> slice:
        start = max(part.start - halo, 0) // grid * grid
        return slice(start, min(math.ceil((part.stop + halo) / grid) * grid, size))

    def of_part(rows: slice, columns: slice) -> NDArray[np.float32]:
        outer = around(rows, shape[0]), around(columns, shape[1])
        return maps(*outer)[:, _within(rows, outer[0]), _within(columns, outer[1])]

    def of_window(rows: slice, columns: slice) -> NDArray[np.float32]:
        strips = [
            np.concatenate([of_part(band, part) for part in parts(columns, side)], axis=2)
            for band in parts(rows, side)
        ]
        return np.concatenate(strips, axis=1)

    return of_window
