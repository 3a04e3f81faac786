"""The results of one image: its files, and what the tables of the run say of it."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg.atomic import as_csv
from cellseg.data.about import About
from cellseg.instances import narrow
from cellseg.predict.drafts import Drafts
from cellseg.predict.formats import probs_file, write_label_strips, write_labels
from cellseg.predict.measure import measure, touches_border
from cellseg.predict.nuclei import LargeNuclei, Nuclei
from cellseg.predict.pictures import SIDE, shrunk, thumbnail, to_bytes, write_overlay
from cellseg.predict.summary import (
    INTENSITIES,
    diameter_counts,
    note_on_saturation,
    summary_row,
)
from cellseg.tiles import Piece

Array = NDArray[Any]

FORMATS = (
    "labels", "overlay", "probs", "table", "parquet", "rois", "geojson", "rle", "coco", "report",
)  # fmt: skip
OUTLINE_FORMATS = {"rois", "geojson", "rle", "coco"}
# Pixels of the largest label image that is held whole, as the formats of outlines need it.
LARGEST_OUTLINED = 2**27
# And of the largest that is held whole for the 16 bits that ImageJ reads: whether there are no more
# nuclei than they count is known at the end.
LARGEST_NARROWED = 2**25


def write_results(
    about: About,
    nuclei: Nuclei | LargeNuclei,
    drafts: Drafts,
    formats: Collection[str],
    expand: float,
    keep: Callable[[str], Any] = str,
) -> tuple[dict[str, Any], dict[str, tuple[Path, str]]]:
    """Write the files of one image; formats of outlines only up to `LARGEST_OUTLINED` px.

    Args:
        about: The image.
        nuclei: Its nuclei.
        drafts: Where the files go.
        formats: Which of `FORMATS`.
        expand: Width of the ring that is measured around each nucleus.
        keep: Puts aside a part of the table of nuclei, and gives its place.

    Returns:
        What the tables of the run need: `rows` of the summary; `diameters`, how many nuclei there
        are of each whole number of px; the name of the `overlay`; as `keep` gives them the parts
        of `objects` as CSV, each with a header; and as texts to be kept those of `rle` without,
        and the `thumbnail` in base 64. And what `drafts` has written, as this may be another
        process.
    """
    shape = (*about.plane_shape, *nuclei.shape[1:])  # as the file has it
    size = math.prod(shape)
    wanted = set(formats) - (OUTLINE_FORMATS if size > LARGEST_OUTLINED else set())
    if left_out := [name for name in FORMATS if name in set(formats) - wanted]:
        about = about.noted(f"{', '.join(left_out)} left out: more than {LARGEST_OUTLINED:,} px")
    facts = about.plane_axes, about.pixel_size, about.z_step
    held = OUTLINE_FORMATS & wanted or (size <= LARGEST_NARROWED and "labels" in wanted)
    whole = np.zeros(nuclei.shape, np.uint32) if held else None
    found = _Found(about, nuclei, wanted, expand, keep)
    with ExitStack() as files:
        probs = None
        if "probs" in wanted:
            path = files.enter_context(drafts.draft("_probs.tif"))
            large = isinstance(nuclei, LargeNuclei)
            probs = files.enter_context(probs_file(path, shape, large)).reshape(nuclei.shape)
        strips = found.strips(probs, whole)
        if "labels" in wanted and whole is None:
            path = files.enter_context(drafts.draft("_labels.tif"))
            write_label_strips(path, strips, shape, *facts)
        for _ in strips:  # all of them, or what comes after the last
            pass
    kept: dict[str, Any] = {"rows": found.rows, "diameters": diameter_counts(found.areas)}
    picture = shrunk(found.picture, SIDE)
    if "overlay" in wanted:
        with drafts.draft("_overlay.png") as path:
            write_overlay(path, picture)
        kept["overlay"] = f"{drafts.stem}_overlay.png"
    if "report" in wanted:
        kept["thumbnail"] = base64.b64encode(thumbnail(picture)).decode()
    if {"table", "parquet"} & wanted:
        kept["objects"] = found.tables
    if whole is not None:
        labels = narrow(whole)
        if "labels" in wanted:
            with drafts.draft("_labels.tif") as path:
                write_labels(path, labels.reshape(shape), *facts)
        flat = labels if about.planes else labels[0]
        kept |= write_outlines(about, flat, found.measured, drafts, wanted)
    return kept, drafts.written


@dataclass
class _Found:
    """What is found of an image while its strips go by.

    Attributes:
        about: The first five are as of `write_results`.
        rows: Of the summary.
        areas: Of the nuclei of each plane.
        tables: As `keep` gives them, where they are wanted.
        measured: The measurements of each piece, where GeoJSON needs them.
        intensities: Of those of the plane at hand, where they are measured: `INTENSITIES`.
        picture: The overlay of the plane with the most nuclei, where it is wanted.
    """

    about: About
    nuclei: Nuclei | LargeNuclei
    formats: set[str]
    expand: float
    keep: Callable[[str], Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    areas: list[Array] = field(default_factory=list)
    tables: list[Any] = field(default_factory=list)
    measured: list[dict[str, Array]] = field(default_factory=list)
    intensities: list[dict[str, Array]] = field(default_factory=list)
    picture: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((1, 1, 3), np.uint8))

    def strips(
        self, probs: NDArray[np.uint8] | None, whole: NDArray[np.uint32] | None
    ) -> Iterator[Array]:
        """The labels of all planes from top to bottom, (h, W) at a time.

        Args:
            probs: (P, H, W), to be filled.
            whole: (P, H, W), to be filled with the labels.
        """
        for plane in range(self.nuclei.shape[0]):
            pieces: list[tuple[Array, float]] = []
            self.intensities.clear()
            drawn: list[NDArray[np.uint8]] = []
            row = 0
            for labels, foreground in self.nuclei.strips(plane, partial(self._take, plane, pieces)):
                rows = slice(row, row + len(labels))
                if probs is not None:
                    probs[plane, rows] = to_bytes(foreground)
                if whole is not None:
                    whole[plane, rows] = labels
                if {"overlay", "report"} & self.formats:
                    drawn.append(self.nuclei.drawn(plane, rows, labels))
                yield labels
                row = rows.stop
            areas = np.concatenate([areas for areas, _ in pieces])
            total = sum(probability for _, probability in pieces)
            confidence = total / areas.sum() if len(areas) else None
            if drawn and len(areas) > max(map(len, self.areas), default=-1):
                self.picture = np.concatenate(drawn)
            self.areas.append(areas)
            about = self.about.noted(note_on_saturation(self.intensities, self.about))
            shape = self.nuclei.shape[1:]
            self.rows.append(summary_row(about, plane, shape, areas, confidence))

    def _take(self, plane: int, pieces: list[tuple[Array, float]], piece: Piece) -> None:
        """Note the areas and the summed probability of a piece's nuclei, and measure them."""
        own = np.where(piece.labels <= piece.count, piece.labels, np.uint32(0))
        inside = piece.probs[own > 0]
        probability = float(inside.mean()) * inside.size if piece.count else 0.0
        pieces.append((np.bincount(own.ravel())[1:], probability))
        if not {"table", "parquet", "geojson"} & self.formats:
            return
        # The ring alone depends on the others.
        columns = self._measure(plane, piece, piece.labels if self.expand else own)
        self.intensities.append({n: v for n, v in columns.items() if n.startswith(INTENSITIES)})
        if "geojson" in self.formats:
            self.measured.append(columns)
        # An image without nuclei has a header in the table, which tells its columns.
        kept = piece.count or not self.tables
        if kept and {"table", "parquet"} & self.formats:
            text = table_text(self.about.file, self.about.plane_names[plane], columns)
            self.tables.append(self.keep(text))

    def _measure(self, plane: int, piece: Piece, labels: Array) -> dict[str, Array]:
        """The measurements of a piece's nuclei, as of the plane."""
        about = self.about
        pixels = self.nuclei.recorded(plane, piece.rows, piece.columns)
        columns = measure(
            labels, pixels, about.channels, piece.probs, about.pixel_size, self.expand
        )
        columns = {name: values[: piece.count] for name, values in columns.items()}
        columns["label"] = columns["label"] + piece.first - 1
        for names, offset in (
            (("centroid_y_px", "bbox_top_px", "bbox_bottom_px"), piece.rows.start),
            (("centroid_x_px", "bbox_left_px", "bbox_right_px"), piece.columns.start),
        ):
            columns |= {name: columns[name] + offset for name in names}
        columns["touches_border"] = touches_border(columns, self.nuclei.shape[1:])
        return columns


def write_outlines(
    about: About,
    labels: Array,
    measured: Sequence[Mapping[str, Array]],
    drafts: Drafts,
    formats: Collection[str],
) -> dict[str, Any]:
    """Write the formats of outlines and runs; see `write_results`.

    Args:
        about: The image.
        labels: (H, W), or (P, H, W) of a stack.
        measured: The measurements, part by part, for GeoJSON.
        drafts: Where the files go.
        formats: Which of `FORMATS`.
    """
    from cellseg.predict import outlines

    if "geojson" in formats:
        names = [name for name in measured[0] if name != "label"]
        numbers = {name: np.concatenate([part[name] for part in measured]) for name in names}
        with drafts.draft(".geojson") as path:
            name = f"{Path(about.stem).name}.geojson"
            outlines.write_geojson(path, labels, numbers, about.planes, about.positions, name)
    if "rois" in formats:
        positions = about.positions if about.is_hyperstack else ()
        with drafts.draft("_rois.zip") as path:
            outlines.write_rois(path, labels, about.planes, positions)
    if "coco" in formats:
        with drafts.draft("_coco.json") as path:
            outlines.write_coco(path, about.file, labels, about.planes)
    if "rle" not in formats:
        return {}
    name = Path(about.stem).name
    # As the competition lays its images out, whose ids have no folders.
    image_id = name if about.stem == f"{name}/images/{name}" else about.stem
    return {"rle": [as_csv(outlines.rle_rows(image_id, labels, about.planes))]}


def table_text(file: str, plane: str, columns: Mapping[str, Array]) -> str:
    """Measurements as CSV with a header."""
    rows = zip(*map(_texts, columns.values()), strict=True)
    return as_csv([["file", "plane", *columns], *([file, plane, *row] for row in rows)])


def _texts(column: Array) -> list[str]:
    if column.dtype.kind in "iu":
        return [str(value) for value in column.tolist()]
    # Seven digits are more than a pixel grid can tell, and all that float32 has. NaN is empty.
    return ["" if value != value else f"{value:.7g}" for value in column.tolist()]
