"""The nuclei of an image: held whole, or of a large one found tile by tile while it is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cellseg.data.about import About
from cellseg.instances import Decoding
from cellseg.predict.pictures import SIDE, outlined, overlay, to_bytes
from cellseg.tiles import MARGIN, TILE, Maps, Piece, margin_for, parts, stitch

Array = NDArray[Any]


@dataclass(frozen=True)
class Nuclei:
    """The nuclei of an image that is held whole. What is asked of them, `LargeNuclei` give too.

    Attributes:
        labels: (P, H, W).
        probs: (P, H, W) foreground probability.
        image: (P, H, W, 3) in [0, 1], as the network saw it.
        pixels: (P, H, W, C) as recorded.
    """

    labels: Array
    probs: NDArray[np.float32]
    image: NDArray[np.float32]
    pixels: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """(P, H, W)."""
        return self.labels.shape

    def strips(
        self, plane: int, found: Callable[[Piece], None]
    ) -> Iterator[tuple[Array, NDArray[np.float32]]]:
        """A plane as of `tiles.stitch`: as one strip with one piece."""
        labels, probs = self.labels[plane], self.probs[plane]
        rows, columns = map(slice, (0, 0), labels.shape)
        found(Piece(rows, columns, labels, int(labels.max(initial=0)), 1, probs))
        yield labels, probs

    def recorded(self, plane: int, rows: slice, columns: slice) -> Array:
        """A window (h, w, C) of the pixels."""
        return self.pixels[plane, rows, columns]

    def drawn(self, plane: int, rows: slice, labels: Array) -> NDArray[np.uint8]:
        """A strip of the overlay."""
        return overlay(self.image[plane, rows], labels, SIDE)


class LargeNuclei:
    """The nuclei of a large image, found while it is read.

    Args:
        about: The image.
        image: Its windows, see `reading.large.LargeImage`.
        maps: Gives those of a plane, see `tiles.stitch`.
        decoding: How they become nuclei.
        tick: Called before each tile; what it raises ends the work.

    Attributes:
        shape: (P, H, W).
    """

    def __init__(
        self,
        about: About,
        image: Any,
        maps: Callable[[int], Maps],
        decoding: Decoding,
        tick: Callable[[], None],
    ) -> None:
        self.image = image
        self.maps = maps
        self.decoding = decoding.at(about.scale)
        self.margin = margin_for(about.scale)
        self.tick = tick
        self.shape: tuple[int, int, int] = image.shape
        planes, height, width = self.shape
        # The overlay shows one pixel of so many a side: a power of 2, since tiles are multiples,
        # as far as the strips of `stitch` are, and no more than a narrow image has.
        fitting = math.ceil(math.log2(max(height, width) / SIDE))
        most = math.floor(math.log2(min(height, width, math.gcd(TILE, MARGIN))))
        self._step = 2 ** max(0, min(fitting, most))
        tiles = planes * math.ceil(height / TILE) * math.ceil(width / TILE)
        self._progress = tqdm(
            total=tiles, desc=about.file, unit="tile", leave=False, disable=None, position=1
        )

    def close(self) -> None:
        """Close the file."""
        self._progress.close()
        self.image.close()

    def strips(
        self, plane: int, found: Callable[[Piece], None]
    ) -> Iterator[tuple[Array, NDArray[np.float32]]]:
        """A plane as of `tiles.stitch`."""
        maps = self.maps(plane)

        def of_tile(rows: slice, columns: slice) -> NDArray[np.float32]:
            self.tick()
            tile = maps(rows, columns)
            self._progress.update()
            return tile

        return stitch(self.shape[1:], of_tile, self.decoding, self.margin, found)

    def recorded(self, plane: int, rows: slice, columns: slice) -> Array:
        """A window (h, w, C) of the pixels."""
        return np.asarray(self.image.recorded(plane, rows, columns))

    def drawn(self, plane: int, rows: slice, labels: Array) -> NDArray[np.uint8]:
        """A strip of the overlay, made smaller."""
        step = self._step
        height, width = len(labels) // step, self.shape[2] // step
        rows = slice(rows.start, rows.start + height * step)
        blocks = []
        for columns in parts(slice(0, width * step), TILE):
            window = self.image.image(plane, rows, columns).numpy()
            cells = window.reshape(3, height, step, -1, step)
            blocks.append(cells.mean(axis=(2, 4)).transpose(1, 2, 0))
        nearest = labels[step // 2 :: step, step // 2 :: step][:height, :width]
        return outlined(to_bytes(np.concatenate(blocks, axis=1)), nearest)
