"""The results of an image that is too large to be held whole: its nuclei tile by tile."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cellseg.data.about import About
from cellseg.instances import Decoding, narrow
from cellseg.predict.drafts import Drafts
from cellseg.predict.formats import probs_on_disk, write_label_strips, write_labels
from cellseg.predict.measure import measure, touches_border
from cellseg.predict.pictures import outlined, shrunk, to_bytes
from cellseg.predict.results import (
    FORMATS,
    SIDE,
    diameter_counts,
    summary_row,
    table_text,
    write_outlines,
    write_picture,
)
from cellseg.tiles import MARGIN, TILE, Maps, Piece, margin_for, parts, stitch

Array = NDArray[Any]

# Pixels of the largest label image that is held whole, as the formats of outlines need it.
LARGEST_OUTLINED = 2**27
# And of the largest that is held whole for the 16 bits that ImageJ reads: whether there are no more
# nuclei than they count is known at the end.
LARGEST_NARROWED = 2**25
OUTLINE_FORMATS = {"rois", "geojson", "rle", "coco"}


class LargeResult:
    """The nuclei of a large image, found and written while it is read.

    Args:
        about: The image.
        image: Its windows, see `data.large.LargeImage`.
        maps: Gives those of a plane, see `tiles.stitch`.
        decoding: How they become nuclei.
        tick: Called before each tile; what it raises ends the work.
        keep: Puts aside the table of a tile's nuclei, and gives its place.
    """

    def __init__(
        self,
        about: About,
        image: Any,
        maps: Callable[[int], Maps],
        decoding: Decoding,
        tick: Callable[[], None],
        keep: Callable[[str], Any],
    ) -> None:
        self.about = about
        self.image = image
        self.maps = maps
        self.decoding = decoding.at(about.scale)
        self.tick = tick
        self.keep = keep
        self.shape: tuple[int, int, int] = image.shape
        # The overlay shows one pixel of so many a side: a power of 2, since tiles are multiples,
        # as far as the strips of `stitch` are, and no more than a narrow image has.
        fitting = math.ceil(math.log2(max(self.shape[1:]) / SIDE))
        most = math.floor(math.log2(min(*self.shape[1:], math.gcd(TILE, MARGIN))))
        self._step = 2 ** max(0, min(fitting, most))
        self._rows: list[dict[str, Any]] = []
        self._areas: list[Array] = []  # of each plane
        self._tables: list[Any] = []
        self._columns: list[dict[str, Array]] = []  # of each tile, where GeoJSON needs them
        self._picture = np.zeros((1, 1, 3), np.uint8)  # of the plane with the most nuclei

    def write(self, drafts: Drafts, formats: Collection[str], expand: float) -> dict[str, Any]:
        """As `results.write_results`; but formats of outlines only up to `LARGEST_OUTLINED` px.

        Of the `objects` there are the places.
        """
        shape = (*self.about.plane_shape, *self.shape[1:])
        size = math.prod(shape)
        wanted = set(formats) - (OUTLINE_FORMATS if size > LARGEST_OUTLINED else set())
        if left_out := [name for name in FORMATS if name in set(formats) - wanted]:
            note = f"{', '.join(left_out)} left out: more than {LARGEST_OUTLINED:,} px"
            self.about = self.about.noted(note)
        facts = self.about.plane_axes, self.about.pixel_size, self.about.z_step
        held = OUTLINE_FORMATS & wanted or (size <= LARGEST_NARROWED and "labels" in wanted)
        whole = np.zeros(self.shape, np.uint32) if held else None
        with ExitStack() as files:
            files.callback(self.image.close)
            probs = None
            if "probs" in wanted:
                path = files.enter_context(drafts.draft("_probs.tif"))
                probs = files.enter_context(probs_on_disk(path, shape)).reshape(self.shape)
            strips = self._strips(wanted, expand, probs, whole)
            if "labels" in wanted and whole is None:
                path = files.enter_context(drafts.draft("_labels.tif"))
                write_label_strips(path, strips, shape, *facts)
            for _ in strips:  # all of them, or what comes after the last
                pass
        kept: dict[str, Any] = {"rows": self._rows, "diameters": diameter_counts(self._areas)}
        kept |= {"objects": self._tables} if {"table", "parquet"} & wanted else {}
        kept |= write_picture(shrunk(self._picture, SIDE), drafts, wanted)
        if whole is not None:
            labels = narrow(whole)
            if "labels" in wanted:
                with drafts.draft("_labels.tif") as path:
                    write_labels(path, labels.reshape(shape), *facts)
            columns: dict[str, Array] = {}
            if self._columns:
                names = self._columns[0]
                columns = {n: np.concatenate([tile[n] for tile in self._columns]) for n in names}
            flat = labels if self.about.planes else labels[0]
            kept |= write_outlines(self.about, flat, columns, drafts, wanted)
        return kept

    def _strips(
        self,
        formats: set[str],
        expand: float,
        probs: NDArray[np.uint8] | None,
        whole: NDArray[np.uint32] | None,
    ) -> Iterator[NDArray[np.uint32]]:
        """The labels of all planes from top to bottom, (h, W) at a time.

        Args:
            formats: What is asked for.
            expand: See `measure`.
            probs: (P, H, W), to be filled.
            whole: (P, H, W), to be filled with the labels.
        """
        planes, height, width = self.shape
        tiles = planes * math.ceil(height / TILE) * math.ceil(width / TILE)
        with tqdm(
            total=tiles, desc=self.about.file, unit="tile", leave=False, disable=None, position=1
        ) as progress:
            for plane in range(planes):
                maps = self._maps_of(plane, progress)
                for rows, labels, foreground in self._plane(plane, maps, formats, expand):
                    if probs is not None:
                        probs[plane, rows] = to_bytes(foreground)
                    if whole is not None:
                        whole[plane, rows] = labels
                    yield labels

    def _plane(
        self, plane: int, maps: Maps, formats: set[str], expand: float
    ) -> Iterator[tuple[slice, NDArray[np.uint32], NDArray[np.float32]]]:
        """Rows of a plane with what `stitch` gives of them, whose nuclei are measured and drawn."""
        found: list[tuple[Array, float]] = []

        def take(piece: Piece) -> None:
            columns = self._measure(plane, piece, expand)
            weighed = float(columns["area_px"] @ columns["confidence"])
            found.append((columns["area_px"], weighed))
            if "geojson" in formats:
                self._columns.append(columns)
            if piece.count and {"table", "parquet"} & formats:
                names = [self.about.plane_names[plane]] * piece.count
                text = table_text(self.about.file, names, columns)
                self._tables.append(self.keep(text))

        height, width = shape = self.shape[1:]
        picture = np.zeros((height // self._step, width // self._step, 3), np.uint8)
        margin = margin_for(self.about.scale)
        row = 0
        for labels, foreground in stitch(shape, maps, self.decoding, margin, take):
            rows = slice(row, row + len(labels))
            if {"overlay", "report"} & formats:
                self._draw(picture, plane, rows, labels)
            yield rows, labels, foreground
            row = rows.stop
        areas = np.concatenate([areas for areas, _ in found])
        total = float(sum(confidence for _, confidence in found))
        confidence = total / areas.sum() if len(areas) else None
        if len(areas) > max(map(len, self._areas), default=-1):
            self._picture = picture
        self._areas.append(areas)
        self._rows.append(summary_row(self.about, plane, shape, areas, confidence))

    def _maps_of(self, plane: int, progress: tqdm[Any]) -> Maps:
        """The maps of a tile of a plane."""
        maps = self.maps(plane)

        def of_tile(rows: slice, columns: slice) -> NDArray[np.float32]:
            self.tick()
            tile = maps(rows, columns)
            progress.update()
            return tile

        return of_tile

    def _measure(self, plane: int, piece: Piece, expand: float) -> dict[str, Array]:
        """The measurements of a tile's nuclei, as of the plane."""
        labels = piece.labels
        if not expand:  # the ring alone depends on the others
            labels = np.where(labels <= piece.count, labels, np.uint32(0))
        pixels = self.image.recorded(plane, piece.rows, piece.columns)
        about = self.about
        columns = measure(labels, pixels, about.channels, piece.probs, about.pixel_size, expand)
        columns = {name: values[: piece.count] for name, values in columns.items()}
        columns["label"] = columns["label"] + piece.first - 1
        for names, offset in (
            (("centroid_y_px", "bbox_top_px", "bbox_bottom_px"), piece.rows.start),
            (("centroid_x_px", "bbox_left_px", "bbox_right_px"), piece.columns.start),
        ):
            columns |= {name: columns[name] + offset for name in names}
        columns["touches_border"] = touches_border(columns, self.shape[1:])
        return columns

    def _draw(
        self, picture: NDArray[np.uint8], plane: int, rows: slice, labels: NDArray[np.uint32]
    ) -> None:
        """Put some rows of the image and its outlines into the overlay."""
        step = self._step
        top, width = rows.start // step, picture.shape[1] * step
        height = min(len(labels) // step, len(picture) - top)
        rows = slice(rows.start, rows.start + height * step)
        blocks = []
        for columns in parts(slice(0, width), TILE):
            window = self.image.image(plane, rows, columns).numpy()
            cells = window.reshape(3, height, step, -1, step)
            blocks.append(cells.mean(axis=(2, 4)).transpose(1, 2, 0))
        small = np.concatenate(blocks, axis=1)
        nearest = labels[step // 2 :: step, step // 2 :: step][:height, : picture.shape[1]]
        picture[top : top + height] = outlined(to_bytes(small), nearest)
