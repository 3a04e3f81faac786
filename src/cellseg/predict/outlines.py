"""Nuclei as outlines and runs for ImageJ and Fiji, QuPath, COCO tools and the Data Science Bowl.

All are exact: read back, they give the same pixels. Coordinates are x, y in pixels from the
top-left corner of the top-left pixel. Stacks of labels (P, H, W) have labels of their own in
each plane.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, uuid5

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from roifile import ImagejRoi
    from shapely import MultiPolygon, Polygon

Array = NDArray[Any]

RLE_COLUMNS = ("ImageId", "EncodedPixels")
# Beyond it, ImageJ reads a whole number as negative.
LARGEST_COORDINATE = 60535


def polygons(labels: Array) -> dict[int, Polygon | MultiPolygon]:
    """The outline of every nucleus of (H, W) labels along the edges of its pixels.

    A nucleus has several polygons where its pixels meet at corners only, or not at all.

    Returns:
        Label to outline, ascending; without points in the middle of straight lines.
    """
    import shapely

    width = labels.shape[1] + 1
    # With a column of background, no run goes on in the next row.
    runs = _runs(np.pad(labels, ((0, 0), (0, 1))).ravel())
    outlines = {}
    for number, (starts, lengths) in runs.items():
        y, x = np.divmod(starts, width)
        outline = shapely.union_all(shapely.box(x, y, x + lengths, y + 1))
        # Simplifying keeps the first point of a ring; normalising makes that a corner.
        outlines[number] = shapely.simplify(shapely.normalize(outline), 0, preserve_topology=False)
    return outlines


def write_rois(
    path: Path,
    labels: Array,
    planes: Sequence[int] = (),
    positions: Sequence[tuple[int, int]] = (),
) -> None:
    """The nuclei as an archive of ImageJ ROIs, for the ROI Manager.

    Traced selections, as the wand makes them; composite ones for nuclei with holes or several
    parts.

    Args:
        path: A file ending in `.zip`.
        labels: (H, W); the ROI of label 12 is named `0012`. Or (P, H, W): label 12 in the third
            plane is named `0003-0012` and lies on slice 3.
        planes: Their indices in the file, from 0; by default all.
        positions: Of each plane of a hyperstack, in z and in time, from 0: ImageJ finds its ROIs
            by them and not by the number of a slice.
    """
    from roifile import roiwrite

    rois = []
    for place, (plane, image) in enumerate(_planes(labels, planes)):
        for number, outline in polygons(image).items():
            roi = _roi(outline, f"{plane:04}-{number:04}" if plane else f"{number:04}")
            if plane and positions:
                roi.z_position, roi.t_position = (at + 1 for at in positions[place])
            else:
                roi.position = plane
            rois.append(roi)
    roiwrite(path, rois, mode="w")


def write_geojson(
    path: Path,
    labels: Array,
    measurements: Mapping[str, Sequence[Any] | Array],
    planes: Sequence[int] = (),
    positions: Sequence[tuple[int, int]] = (),
    name: str = "",
) -> None:
    """The nuclei as detections for QuPath, as GeoJSON.

    Args:
        path: A file ending in `.geojson`.
        labels: (H, W), or (P, H, W) of a stack. The label is the name.
        measurements: Name to one number per nucleus, by plane and label; those that are not
            finite are left out, as JSON has none.
        planes: Their indices in the file, from 0; by default all.
        positions: Of each plane, in z and in time, from 0; by default z is its index.
        name: What the ids are made of, besides plane and label; by default the file's name.
    """
    import shapely

    features: list[dict[str, Any]] = []
    for place, (plane, image) in enumerate(_planes(labels, planes)):
        z, t = positions[place] if positions else (plane - 1, 0)
        for number, outline in polygons(image).items():
            parts = [
                [
                    shapely.get_coordinates(ring).astype(int).tolist()
                    for ring in shapely.get_rings(part)
                ]
                for part in shapely.get_parts(outline)
            ]
            geometry: dict[str, Any] = {"type": "Polygon", "coordinates": parts[0]}
            if len(parts) > 1:
                geometry = {"type": "MultiPolygon", "coordinates": parts}
            if plane:
                geometry["plane"] = {"c": -1, "z": z, "t": t}  # -1: all channels
            values = {key: float(column[len(features)]) for key, column in measurements.items()}
            features.append(
                {
                    "type": "Feature",
                    # QuPath keeps it, and so knows the nucleus when it is exported again.
                    "id": str(uuid5(NAMESPACE_URL, f"{name or path.name}#{plane}-{number}")),
                    "geometry": geometry,
                    "properties": {
                        "objectType": "detection",
                        "name": str(number),
                        "measurements": {
                            key: value for key, value in values.items() if math.isfinite(value)
                        },
                    },
                }
            )
    _write_json(path, {"type": "FeatureCollection", "features": features})


def rle_rows(image_id: str, labels: Array, planes: Sequence[int] = ()) -> list[tuple[str, str]]:
    """The nuclei in the run-length encoding of the 2018 Data Science Bowl.

    Pixels are counted from 1, down each column and then to the right; a row is a nucleus, in
    the order of labels, which the format has no place for.

    Args:
        image_id: The first column.
        labels: (H, W), or (P, H, W) whose third plane has `#3` appended to its id.
        planes: Their indices in the file, from 0; by default all.

    Returns:
        Rows of `RLE_COLUMNS`; one without runs for an image without nuclei.
    """
    rows = []
    for plane, image in _planes(labels, planes):
        runs = _runs(image.ravel(order="F")).values()
        texts = [
            " ".join(map(str, np.stack([starts + 1, lengths], axis=1).ravel().tolist()))
            for starts, lengths in runs
        ]
        identity = f"{image_id}#{plane}" if plane else image_id
        rows += [(identity, text) for text in texts or [""]]
    return rows


def write_coco(path: Path, file_name: str, labels: Array, planes: Sequence[int] = ()) -> None:
    """The nuclei as COCO annotations; `label` holds the label, as ids must not repeat.

    Args:
        path: A file ending in `.json`.
        file_name: The image that the annotations belong to.
        labels: (H, W), or (P, H, W) whose planes become images of the same name, told apart by
            `plane`.
        planes: Their indices in the file, from 0; by default all.
    """
    height, width = labels.shape[-2:]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for plane, image in _planes(labels, planes):
        image_id = plane or 1
        facts = {"id": image_id, "file_name": file_name, "height": height, "width": width}
        images.append(facts | ({"plane": plane - 1} if plane else {}))
        for number, (starts, lengths) in _runs(image.ravel(order="F")).items():
            ends = starts + lengths
            left, right = int(starts[0] // height), int((ends[-1] - 1) // height) + 1
            y = starts % height
            top, bottom = int(y.min()), int((y + lengths).max())
            if bottom > height:  # a run that goes on at the top of the next column
                top, bottom = 0, height
            edges = np.stack([starts, ends], axis=1).ravel()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 1,
                    "label": number,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": int(lengths.sum()),
                    # 1 would make evaluation ignore it, though COCO's own runs are of crowds:
                    # pycocotools goes by the type of `segmentation`. Its polygons have no holes.
                    "iscrowd": 0,
                    "segmentation": {
                        "size": [height, width],
                        "counts": np.diff(edges, prepend=0, append=image.size).tolist(),
                    },
                }
            )
    categories = [{"id": 1, "name": "nucleus"}]
    _write_json(path, {"images": images, "categories": categories, "annotations": annotations})


def _planes(labels: Array, planes: Sequence[int]) -> list[tuple[int, Array]]:
    """Each plane of a stack with its number in the file, from 1; a single image as plane 0."""
    if labels.ndim == 2:
        return [(0, labels)]
    return [(place + 1, labels[i]) for i, place in enumerate(planes or range(len(labels)))]


def _runs(flat: Array) -> dict[int, tuple[Array, Array]]:
    """Label to the starts and the lengths of its runs in flattened labels; 0 left out."""
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = np.diff(starts, append=flat.size)
    values = flat[starts]
    order = np.argsort(values, kind="stable")
    order = order[np.count_nonzero(values == 0) :]
    numbers, first = np.unique(values[order], return_index=True)
    groups = np.split(order, first[1:])
    return {
        int(number): (starts[group], lengths[group])
        for number, group in zip(numbers, groups[: len(numbers)], strict=True)
    }


def _roi(outline: Polygon | MultiPolygon, name: str) -> ImagejRoi:
    import shapely
    from roifile import ROI_TYPE, ImagejRoi

    rings = shapely.get_rings(shapely.get_parts(outline))
    rings = [shapely.get_coordinates(ring)[:-1] for ring in rings]
    left, top, right, bottom = (int(bound) for bound in outline.bounds)
    roi = ImagejRoi(name=name, left=left, top=top, right=right, bottom=bottom)
    if len(rings) == 1 and max(right, bottom) <= LARGEST_COORDINATE:
        roi.roitype = ROI_TYPE.TRACED
        roi.integer_coordinates = (rings[0] - (left, top)).astype(np.int32)
        roi.n_coordinates = len(rings[0])
        return roi
    # A path of java.awt.geom.PathIterator: 0 moves to a point, 1 draws to it, 4 closes. ImageJ
    # fills what an odd number of its rings encloses.
    steps = [np.insert(ring, 0, 1, axis=1) for ring in rings]
    for step in steps:
        step[0, 0] = 0
    path = np.concatenate([np.append(step.ravel(), 4) for step in steps])
    roi.roitype = ROI_TYPE.RECT
    roi.multi_coordinates = path.astype(np.float32)
    roi.shape_roi_size = len(path)
    return roi


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    # Indented, every coordinate would take a line.
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
