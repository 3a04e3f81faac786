"""Label images from outlines that people drew: ROIs of ImageJ and Fiji, GeoJSON of QuPath.

Coordinates are x, y in pixels from the top-left corner of the top-left pixel, as both
programs count, so that the pixel in row 2 and column 3 spans (3, 2) to (4, 3) and its centre
is (3.5, 2.5). A pixel belongs to a nucleus when its centre lies within the outline.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile

import numpy as np
from numpy.typing import NDArray

from cellseg.errors import InputError

if TYPE_CHECKING:
    from roifile import ImagejRoi

Labels = NDArray[np.int32]
# Indices into a flattened image.
Pixels = NDArray[np.intp]


def read_rois(source: Path | bytes, shape: tuple[int, int], name: str = "") -> Labels:
    """The selections of an ImageJ ROI archive (.zip) or of a single .roi file as labels.

    Polygons, freehand and traced selections, ellipses, rectangles, ovals and combinations of
    them are read; splines and rounded corners are taken as straight. What is no area (points,
    lines, text) is refused rather than lost.

    Args:
        source: The file, or its bytes.
        shape: Height and width of the image that the outlines belong to.
        name: What to call the file in errors; its path where none is given.

    Returns:
        (H, W). A nucleus's label is its name where every name is a different whole number
        above 0, as we write them; otherwise nuclei are counted from 1. Where outlines overlap,
        the later one keeps what is still free; what lies outside the image is cut off.

    Raises:
        InputError: The file is damaged, holds selections that are no areas, one within another,
            or those of several planes of a stack.
    """
    with _explained(name or str(source), "ImageJ ROIs"):
        rois = _parse_rois(source if isinstance(source, bytes) else source.read_bytes())
        planes = {(roi.position, roi.z_position, roi.t_position) for _, roi in rois}
        _one_plane(planes - {(0, 0, 0)})  # 0: on every plane
        return _painted([(label, [_selected(label, roi, shape)]) for label, roi in rois], shape)


def read_geojson(source: Path | bytes, shape: tuple[int, int], name: str = "") -> Labels:
    """The polygons of a GeoJSON file, as QuPath exports them, as labels.

    A feature collection, a list of features or one feature; polygons and multi-polygons with
    their holes. Of a cell, its nucleus counts where the file has it.

    Args:
        source: The file, or its bytes.
        shape: Height and width of the image that the outlines belong to.
        name: What to call the file in errors; its path where none is given.

    Returns:
        (H, W); labels and overlaps as in `read_rois`.

    Raises:
        InputError: The file is damaged, holds features that are no areas, one within another, or
            those of several planes of a stack.
    """
    with _explained(name or str(source), "GeoJSON"):
        data = source if isinstance(source, bytes) else source.read_bytes()
        features = _parse_features(json.loads(data))
        areas = [
            (
                str((feature.get("properties") or {}).get("name", "")),
                [_inside(polygon, shape) for polygon in _polygons(number, feature)],
            )
            for number, feature in enumerate(features, 1)
        ]
        return _painted(areas, shape)


@contextmanager
def _explained(name: str, kind: str) -> Iterator[None]:
    """Names the file in errors of reading outlines, of whatever type they are."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:  # decoders have many for damage, and JSON may hold anything
        cause = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name}: no {kind}, or damaged: {cause}") from error


def _one_plane(planes: set[Any]) -> None:
    if len(planes) > 1:
        raise InputError(f"outlines on {len(planes)} planes of a stack; save those of one plane")


def _parse_rois(data: bytes) -> list[tuple[str, ImagejRoi]]:
    from roifile import ImagejRoi

    if data[:2] != b"PK":
        roi = ImagejRoi.frombytes(data)
        return [(roi.name, roi)]
    with ZipFile(BytesIO(data)) as archive:
        names = archive.namelist()
        # Archives from a Mac hold a hidden twin of each file.
        entries = [
            (path.stem, entry)
            for entry in names
            if (path := PurePosixPath(entry)).suffix.lower() == ".roi" and path.name[0] != "."
        ]
        if names and not entries:
            raise InputError("an archive without ROIs; save them from the ROI Manager")
        return [(label, ImagejRoi.frombytes(archive.read(entry))) for label, entry in entries]


def _selected(label: str, roi: ImagejRoi, shape: tuple[int, int]) -> Pixels:
    from roifile import ROI_SUBTYPE, ROI_TYPE

    if roi.subtype in (ROI_SUBTYPE.TEXT, ROI_SUBTYPE.IMAGE):
        kind = roi.subtype.name
    elif roi.composite:
        return _inside(list(roi.coordinates(multi=True)), shape)
    elif roi.roitype in (ROI_TYPE.POLYGON, ROI_TYPE.FREEHAND, ROI_TYPE.TRACED):
        return _inside([roi.coordinates()], shape)
    elif roi.roitype in (ROI_TYPE.RECT, ROI_TYPE.OVAL):
        box: tuple[float, float, float, float]
        box = roi.left, roi.top, roi.right - roi.left, roi.bottom - roi.top
        if roi.subpixelrect:
            box = roi.xd, roi.yd, roi.widthd, roi.heightd
        if roi.roitype == ROI_TYPE.OVAL:
            return _inside_oval(box, shape)
        x, y, width, height = box
        return _inside([[(x, y), (x + width, y), (x + width, y + height), (x, y + height)]], shape)
    else:
        kind = roi.roitype.name
    raise InputError(f"the selection {label!r} is no area but of type {kind.lower()}; delete it")


def _parse_features(content: Any) -> list[dict[str, Any]]:
    features = content.get("features", [content]) if isinstance(content, dict) else content
    for feature in features:
        if feature.get("type") != "Feature":
            raise InputError("holds no GeoJSON features; export the objects as GeoJSON")
    planes = [feature["geometry"].get("plane", {}) for feature in features if feature["geometry"]]
    _one_plane({(plane.get("z", 0), plane.get("t", 0)) for plane in planes})
    return list(features)


def _polygons(number: int, feature: dict[str, Any]) -> list[Any]:
    geometry = feature.get("nucleusGeometry") or feature["geometry"] or {}
    kind = geometry.get("type")
    if kind == "Polygon":
        return [geometry["coordinates"]]
    if kind == "MultiPolygon":
        return list(geometry["coordinates"])
    raise InputError(f"feature {number} is no area but of type {kind}; delete it")


def _refuse_nested(areas: Sequence[tuple[str, Sequence[Pixels]]], size: int) -> None:
    """Refuse an outline that lies mostly within a larger one, in an image of so many pixels.

    One of them is no nucleus: a region that was drawn around nuclei, or what was replaced by its
    parts.
    """
    pixels = [np.unique(np.concatenate([*parts, np.empty(0, np.intp)])) for _, parts in areas]
    owner = np.zeros(size, np.intp)
    for number in sorted(range(len(areas)), key=lambda number: -len(pixels[number])):
        below = owner[pixels[number]]
        if 2 * np.count_nonzero(below) > len(below):
            other = int(np.bincount(below[below > 0]).argmax())
            inner, outer = (
                f"outline {n}" + (f" ({areas[n - 1][0]})" if areas[n - 1][0] else "")
                for n in (number + 1, other)
            )
            raise InputError(
                f"{inner} lies within {outer}; delete the one that is no nucleus of its own"
            )
        owner[pixels[number]] = number + 1


def _inside(rings: Sequence[Any], shape: tuple[int, int]) -> Pixels:
    """The pixels within an odd number of closed rings, each (N, 2): holes are rings as well.

    Centres on an outline belong to the side that ImageJ's PolygonFiller gives them to, so that
    of two nuclei with a common edge each pixel is in one: an area lacks its left and upper
    edge. scikit-image's `polygon` takes all edges, which makes drawn nuclei larger.
    """
    points = [np.asarray(ring, np.float64)[:, :2] for ring in rings if len(ring)]
    if not points:
        return np.empty(0, np.intp)
    start = np.concatenate(points)
    end = np.concatenate([np.roll(ring, -1, axis=0) for ring in points])
    if not np.isfinite(start).all():
        raise ValueError("a coordinate that is no number")
    downwards = (start[:, 1] < end[:, 1])[:, None]
    (x0, y0), (x1, y1) = np.where(downwards, start, end).T, np.where(downwards, end, start).T
    # The rows and columns whose centres lie behind a coordinate begin at the rounded one.
    first, stop = (np.clip(np.floor(y + 0.5), 0, shape[0]).astype(np.intp) for y in (y0, y1))
    counts = stop - first
    if not counts.any():
        return np.empty(0, np.intp)
    edge = np.repeat(np.arange(len(counts)), counts)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts - first, counts)
    x = x0[edge] + (row + 0.5 - y0[edge]) * ((x1 - x0)[edge] / (y1 - y0)[edge])
    column = np.clip(np.floor(x + 0.5), 0, shape[1]).astype(np.intp)
    top, left = row.min(), column.min()
    crossed = np.zeros((row.max() - top + 1, column.max() - left + 1), bool)
    np.logical_xor.at(crossed, (row - top, column - left), True)
    rows, columns = np.nonzero(np.logical_xor.accumulate(crossed, axis=1))
    return np.asarray((rows + top) * shape[1] + columns + left)


def _inside_oval(box: tuple[float, float, float, float], shape: tuple[int, int]) -> Pixels:
    from skimage.draw import ellipse

    x, y, width, height = box
    if width <= 0 or height <= 0:
        return np.empty(0, np.intp)
    # In scikit-image, whole numbers are the centres of pixels.
    centre = (y + height / 2 - 0.5, x + width / 2 - 0.5)
    rows, columns = ellipse(*centre, height / 2, width / 2, shape=shape)
    return np.asarray(rows * shape[1] + columns, np.intp)


def _painted(areas: Sequence[tuple[str, Sequence[Pixels]]], shape: tuple[int, int]) -> Labels:
    """Named areas, each the union of its parts, as labels; see `read_rois`."""
    names = [name for name, _ in areas]
    ids = list(range(1, len(names) + 1))
    if all(re.fullmatch(r"0*[1-9][0-9]{0,8}", name) for name in names):
        numbers = [int(name) for name in names]
        ids = numbers if len(set(numbers)) == len(numbers) else ids
    outside = sum(not any(pixels.size for pixels in parts) for _, parts in areas)
    if 2 * outside > len(areas):
        raise InputError(
            f"{outside} of {len(areas)} outlines lie outside of the image of {shape[0]} x "
            f"{shape[1]} px; is it another image's file, or in um?"
        )
    _refuse_nested(areas, shape[0] * shape[1])
    labels = np.zeros(shape[0] * shape[1], np.int32)
    for number, (_, parts) in zip(ids, areas, strict=True):
        for pixels in parts:
            labels[pixels[labels[pixels] == 0]] = number
    return labels.reshape(shape)
