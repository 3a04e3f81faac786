"""The results of one image: its files, and what the tables of the run say of it."""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg.atomic import as_csv
from cellseg.data.about import About
from cellseg.instances import equivalent_diameter
from cellseg.predict.drafts import Drafts
from cellseg.predict.formats import write_labels, write_probs
from cellseg.predict.measure import measure
from cellseg.predict.pictures import overlay, thumbnail, write_overlay

Array = NDArray[Any]

FORMATS = (
    "labels", "overlay", "probs", "table", "parquet", "rois", "geojson", "rle", "coco", "report",
)  # fmt: skip
# Longest side of an overlay in px.
SIDE = 2048
# The confidence of no validation image of nuclei-1 is lower, see `docs/outputs.md`.
UNSURE = 0.85


@dataclass(frozen=True)
class Result:
    """The nuclei of an image.

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


def write_results(
    about: About,
    result: Result,
    drafts: Drafts,
    formats: Collection[str],
    expand: float,
) -> tuple[dict[str, Any], dict[str, tuple[Path, str]]]:
    """Write the files of one image.

    Args:
        about: The image.
        result: Its nuclei.
        drafts: Where the files go.
        formats: Which of `FORMATS`.
        expand: Width of the ring that is measured around each nucleus.

    Returns:
        What the tables of the run need: `rows` of the summary; `diameters`, how many nuclei there
        are of each whole number of px; the name of the `overlay`; and as texts to be kept the
        parts of `objects` as CSV, each with a header, those of `rle` without, and the `thumbnail`
        in base 64. And what `drafts` has written, as this may be another process.
    """

    def shaped(planes: Array) -> Array:  # as the file has them
        return planes.reshape(*about.plane_shape, *planes.shape[1:])

    areas = [np.bincount(plane.ravel())[1:] for plane in result.labels]
    kept: dict[str, Any] = {"rows": [], "diameters": diameter_counts(areas)}
    for place, labels in enumerate(result.labels):
        inside = result.probs[place][labels > 0]
        confidence = float(inside.mean()) if inside.size else None
        kept["rows"].append(summary_row(about, place, labels.shape, areas[place], confidence))
    if "labels" in formats:
        facts = about.plane_axes, about.pixel_size, about.z_step
        with drafts.draft("_labels.tif") as path:
            write_labels(path, shaped(result.labels), *facts)
    if "probs" in formats:
        with drafts.draft("_probs.tif") as path:
            write_probs(path, shaped(result.probs))
    if {"overlay", "report"} & set(formats):
        # Of a stack, the plane with the most nuclei.
        best = int(np.argmax([len(plane) for plane in areas]))
        picture = overlay(result.image[best], result.labels[best], SIDE)
        kept |= write_picture(picture, drafts, formats)
    columns: dict[str, Array] = {}
    if {"table", "parquet", "geojson"} & set(formats):
        columns = _measurements(about, result, expand)
    if {"table", "parquet"} & set(formats):
        names = zip(about.plane_names, map(len, areas), strict=True)
        planes = list(chain.from_iterable([name] * count for name, count in names))
        kept["objects"] = [table_text(about.file, planes, columns)]
    flat = result.labels if about.planes else result.labels[0]
    return kept | write_outlines(about, flat, columns, drafts, formats), drafts.written


def write_picture(
    picture: NDArray[np.uint8], drafts: Drafts, formats: Collection[str]
) -> dict[str, Any]:
    """Write an image with its outlines; see `write_results`."""
    kept = {}
    if "overlay" in formats:
        with drafts.draft("_overlay.png") as path:
            write_overlay(path, picture)
        kept["overlay"] = f"{drafts.stem}_overlay.png"
    if "report" in formats:
        kept["thumbnail"] = base64.b64encode(thumbnail(picture)).decode()
    return kept


def write_outlines(
    about: About,
    labels: Array,
    columns: Mapping[str, Array],
    drafts: Drafts,
    formats: Collection[str],
) -> dict[str, Any]:
    """Write the formats of outlines and runs; see `write_results`.

    Args:
        about: The image.
        labels: (H, W), or (P, H, W) of a stack.
        columns: The measurements, for GeoJSON.
        drafts: Where the files go.
        formats: Which of `FORMATS`.
    """
    from cellseg.predict import outlines

    if "geojson" in formats:
        numbers = {name: column for name, column in columns.items() if name != "label"}
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


def summary_row(
    about: About,
    place: int,
    shape: Sequence[int],
    areas: Array,
    confidence: float | None,
) -> dict[str, Any]:
    """The row of one plane, of shape (H, W); its confidence is None without nuclei."""
    median = float(np.median(areas)) if len(areas) else 0.0
    unsure = confidence is not None and confidence < UNSURE
    return {
        "file": about.file,
        "plane": about.plane_names[place],
        "status": "ok",
        "height": shape[0],
        "width": shape[1],
        "scale": f"{about.scale:.3g}",
        "nuclei": len(areas),
        "median_area_px": f"{median:g}" if len(areas) else "",
        "median_diameter_px": f"{equivalent_diameter(median):.1f}" if len(areas) else "",
        "confidence": "" if confidence is None else f"{confidence:.3f}",
        "unusual": f"confidence below {UNSURE:g}" if unsure else "",
        "message": about.note,
    }


def diameter_counts(areas: Sequence[Array]) -> list[int]:
    """How many nuclei have an equivalent diameter that rounds to 0, 1, 2, … px."""
    diameters = equivalent_diameter(np.concatenate(areas))
    counts: list[int] = np.bincount(np.rint(diameters).astype(int)).tolist()
    return counts


def _measurements(about: About, result: Result, expand: float) -> dict[str, Array]:
    """The columns of all planes, one below the other."""
    planes = [
        measure(labels, pixels, about.channels, probs, about.pixel_size, expand)
        for labels, pixels, probs in zip(result.labels, result.pixels, result.probs, strict=True)
    ]
    return {name: np.concatenate([plane[name] for plane in planes]) for name in planes[0]}


def table_text(file: str, planes: Sequence[str], columns: Mapping[str, Array]) -> str:
    """Measurements as CSV with a header; each nucleus has the name of its plane."""
    rows = zip(planes, *map(_texts, columns.values()), strict=True)
    return as_csv([["file", "plane", *columns], *([file, *row] for row in rows)])


def _texts(column: Array) -> list[str]:
    if column.dtype.kind in "iu":
        return [str(value) for value in column.tolist()]
    # Seven digits are more than a pixel grid can tell, and all that float32 has. NaN is empty.
    return ["" if value != value else f"{value:.7g}" for value in column.tolist()]
