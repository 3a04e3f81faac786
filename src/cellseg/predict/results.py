"""The results of one image: its files, and what the tables of the run say of it."""

from __future__ import annotations

import base64
import csv
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg.predict.formats import (
    overlay,
    thumbnail,
    write_labels,
    write_overlay,
    write_probs,
)

Array = NDArray[Any]

FORMATS = (
    "labels", "overlay", "probs", "table", "parquet", "rois", "geojson", "rle", "coco", "report",
)  # fmt: skip
# Longest side of an overlay in px.
SIDE = 2048
# The confidence of no validation image of nuclei-1 is lower, see `docs/outputs.md`.
UNSURE = 0.86


@dataclass(frozen=True)
class Result:
    """The nuclei of one file, with what was recorded of them.

    Attributes:
        file: Relative POSIX name.
        stem: What its results are called.
        planes: Index of each plane in the file; empty for a file of one plane.
        axes: What the planes are, such as "TZ", with as many numbers of them in `shape`.
        shape: Of the planes; their product is P.
        labels: (P, H, W).
        probs: (P, H, W) foreground probability.
        image: (P, H, W, 3) in [0, 1], as the network saw it.
        pixels: (P, H, W, C) as recorded.
        channels: Names of the C channels.
        pixel_size: In um, or None.
        scale: Factor by which the image was enlarged for the network.
        note: For the summary.
    """

    file: str
    stem: str
    planes: Sequence[int]
    axes: str
    shape: tuple[int, ...]
    labels: Array
    probs: NDArray[np.float32]
    image: NDArray[np.float32]
    pixels: Array
    channels: Sequence[str]
    pixel_size: float | None
    scale: float
    note: str


def write_results(
    result: Result, dir: Path, formats: Collection[str], expand: float
) -> tuple[dict[str, Any], list[str]]:
    """Write the files of one image.

    Args:
        result: The image's.
        dir: The results folder.
        formats: Which of `FORMATS`.
        expand: Width of the ring that is measured around each nucleus.

    Returns:
        What the journal keeps for the tables of the run: `rows` of the summary, the parts of
        `objects` as CSV, each with a header, those of `rle` without, `thumbnail` in base 64, and
        `diameters`, how many nuclei there are of each whole number of px; and the names of the
        files, relative to `dir`.
    """
    written: list[str] = []

    def path(ending: str) -> Path:
        written.append(result.stem + ending)
        return dir / written[-1]

    def shaped(planes: Array) -> Array:  # as the file has them
        return planes.reshape(*result.shape, *planes.shape[1:])

    flat = result.labels if result.planes else result.labels[0]
    kept: dict[str, Any] = {"rows": list(_rows(result)), "diameters": _diameters(result.labels)}
    if "labels" in formats:
        write_labels(path("_labels.tif"), shaped(result.labels), result.axes, result.pixel_size)
    if "probs" in formats:
        write_probs(path("_probs.tif"), shaped(result.probs))
    if {"overlay", "report"} & set(formats):
        # Of a stack, the plane with the most nuclei.
        best = int(np.argmax([plane.max() for plane in result.labels]))
        picture = overlay(result.image[best], result.labels[best], SIDE)
        if "overlay" in formats:
            write_overlay(path("_overlay.png"), picture)
            kept["overlay"] = written[-1]
        if "report" in formats:
            kept["thumbnail"] = base64.b64encode(thumbnail(picture)).decode()
    if {"table", "parquet", "geojson"} & set(formats):
        columns = _measurements(result, expand)
        if {"table", "parquet"} & set(formats):
            kept["objects"] = [_csv(result, columns)]
        if "geojson" in formats:
            from cellseg.predict.outlines import write_geojson

            numbers = {name: column for name, column in columns.items() if name != "label"}
            write_geojson(path(".geojson"), flat, numbers)
    if {"rois", "rle", "coco"} & set(formats):
        from cellseg.predict.outlines import RLE_COLUMNS, rle_rows, write_coco, write_rois

        if "rois" in formats:
            write_rois(path("_rois.zip"), flat)
        if "coco" in formats:
            write_coco(path("_coco.json"), result.file, flat)
        if "rle" in formats:
            lines = StringIO()
            table = csv.DictWriter(lines, RLE_COLUMNS, lineterminator="\n")
            table.writerows(rle_rows(result.stem, flat))
            kept["rle"] = [lines.getvalue()]
    return kept, written


def _rows(result: Result) -> Iterator[dict[str, Any]]:
    for place, labels in enumerate(result.labels):
        areas = np.bincount(labels.ravel())[1:]
        inside = result.probs[place][labels > 0] if labels.any() else np.ones(1)
        median = float(np.median(areas)) if len(areas) else 0.0
        yield {
            "file": result.file,
            "plane": result.planes[place] if result.planes else "",
            "status": "ok",
            "height": labels.shape[0],
            "width": labels.shape[1],
            "scale": f"{result.scale:.3g}",
            "nuclei": len(areas),
            "median_area_px": f"{median:g}" if len(areas) else "",
            "median_diameter_px": f"{np.sqrt(4 / np.pi * median):.1f}" if len(areas) else "",
            "confidence": f"{inside.mean():.3f}" if len(areas) else "",
            "unusual": f"confidence below {UNSURE:g}" if inside.mean() < UNSURE else "",
            "message": result.note,
        }


def _diameters(labels: Array) -> list[int]:
    """How many nuclei have an equivalent diameter that rounds to 0, 1, 2, … px."""
    areas = np.concatenate([np.bincount(plane.ravel())[1:] for plane in labels])
    counts: list[int] = np.bincount(np.rint(np.sqrt(4 / np.pi * areas)).astype(int)).tolist()
    return counts


def _measurements(result: Result, expand: float) -> dict[str, Array]:
    """The columns of all planes, one below the other."""
    from cellseg.predict.measure import measure

    planes = [
        measure(labels, pixels, result.channels, probs, result.pixel_size, expand)
        for labels, pixels, probs in zip(result.labels, result.pixels, result.probs, strict=True)
    ]
    return {name: np.concatenate([plane[name] for plane in planes]) for name in planes[0]}


def _csv(result: Result, columns: Mapping[str, Array]) -> str:
    lines = StringIO()
    table = csv.writer(lines, lineterminator="\n")
    table.writerow(["file", "plane", *columns])
    names = [str(plane) for plane in result.planes] or [""]
    planes = chain.from_iterable(
        [name] * int(labels.max()) for name, labels in zip(names, result.labels, strict=True)
    )
    texts = [_texts(column) for column in columns.values()]
    for plane, *values in zip(planes, *texts, strict=True):
        table.writerow([result.file, plane, *values])
    return lines.getvalue()


def _texts(column: Array) -> list[str]:
    if column.dtype.kind in "iu":
        return [str(value) for value in column.tolist()]
    # Seven digits are more than a pixel grid can tell, and all that float32 has. NaN is empty.
    return ["" if value != value else f"{value:.7g}" for value in column.tolist()]
