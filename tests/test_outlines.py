from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import roifile
import shapely
from skimage.draw import polygon2mask
from skimage.segmentation import relabel_sequential

from cellseg.data.outlines import read_geojson, read_rois
from cellseg.errors import InputError
from cellseg.predict.outlines import (
    polygons,
    rle_rows,
    write_coco,
    write_geojson,
    write_rois,
)

SHAPE = (60, 80)


def touching() -> np.ndarray:
    """Nuclei side by side that cover everything, borders included."""
    rows, columns = np.indices(SHAPE)
    seeds = np.random.default_rng(1).uniform((0, 0), SHAPE, (40, 2))
    near = (rows[..., None] - seeds[:, 0]) ** 2 + (columns[..., None] - seeds[:, 1]) ** 2
    return near.argmin(axis=2) + 1


def ring_in_ring() -> np.ndarray:
    distance = np.hypot(*(np.indices(SHAPE) - np.array([30, 40])[:, None, None]))
    # The second nucleus lies in the hole of the first, and has a hole with a third in it.
    return np.select([distance < 4, distance < 8, distance < 14, distance < 20], [7, 0, 2, 5], 0)


def corners() -> np.ndarray:
    """Parts that meet at corners only: of one nucleus, of two, and around holes."""
    labels = np.zeros(SHAPE, int)
    labels[::2, ::2] = labels[1::2, 1::2] = 3
    labels[10:20, 10:20] = 4
    labels[12, 12] = labels[13, 13] = 0
    labels[20:30, 20:30] = 9
    labels[20, 20] = labels[29, 29] = 0
    return labels


def single_pixels() -> np.ndarray:
    labels = np.zeros(SHAPE, int)
    labels[2, 3] = 1
    labels[0, 0], labels[0, -1], labels[-1, 0], labels[-1, -1] = 2, 3, 4, 5
    labels[30, :], labels[:, 40] = 6, 7
    return labels


def many() -> np.ndarray:
    """More than 255 nuclei, with large ids and gaps between them."""
    return np.where(np.indices(SHAPE).sum(axis=0) % 3, np.arange(4800).reshape(SHAPE) * 97 + 5, 0)


AWKWARD: dict[str, np.ndarray] = {
    "touching": touching(),
    "ring in ring": ring_in_ring(),
    "corners": corners(),
    "single pixels": single_pixels(),
    "many": many(),
    "noise": np.random.default_rng(2).integers(0, 4, SHAPE),
    "all one": np.full(SHAPE, 12),
    "none": np.zeros(SHAPE, int),
}
awkward = pytest.mark.parametrize("labels", AWKWARD.values(), ids=AWKWARD.keys())
dtypes = pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int32, np.int64])


def areas(labels: np.ndarray) -> dict[int, int]:
    ids, counts = np.unique(labels[labels > 0], return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


@awkward
def test_an_outline_is_valid_has_the_area_of_its_pixels_and_no_needless_points(
    labels: np.ndarray,
) -> None:
    outlines = polygons(labels)
    assert {number: outline.area for number, outline in outlines.items()} == areas(labels)
    assert all(shapely.is_valid(outline) for outline in outlines.values())
    for ring in shapely.get_rings(shapely.get_parts(list(outlines.values()))):
        x, y = np.abs(np.diff(shapely.get_coordinates(ring), axis=0)).T
        # Straight along an axis, and with a turn at each point, the first included.
        assert ((x == 0) != (y == 0)).all()
        assert ((x == 0) != np.roll(x == 0, 1)).all()


def test_a_nucleus_of_one_pixel_is_the_square_between_its_corners() -> None:
    assert polygons(single_pixels())[1].equals(shapely.box(3, 2, 4, 3))


@awkward
def test_fault_33_rois_come_back_as_the_same_labels(labels: np.ndarray, tmp_path: Path) -> None:
    write_rois(tmp_path / "nuclei.zip", labels)
    np.testing.assert_array_equal(read_rois(tmp_path / "nuclei.zip", SHAPE), labels)


@awkward
def test_fault_33_geojson_comes_back_as_the_same_labels(labels: np.ndarray, tmp_path: Path) -> None:
    write_geojson(tmp_path / "nuclei.geojson", labels, {})
    np.testing.assert_array_equal(read_geojson(tmp_path / "nuclei.geojson", SHAPE), labels)


@awkward
def test_fault_33_rle_comes_back_as_the_same_nuclei(labels: np.ndarray) -> None:
    decoded = np.zeros(labels.size, int)
    for number, (image_id, text) in enumerate(rle_rows("image", labels), 1):
        assert image_id == "image"
        runs = np.array(text.split(), int).reshape(-1, 2)
        for start, length in runs:
            assert not decoded[start - 1 : start - 1 + length].any()
            decoded[start - 1 : start - 1 + length] = number
    expected = relabel_sequential(labels)[0]
    np.testing.assert_array_equal(decoded.reshape(SHAPE, order="F"), expected)


@awkward
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools 2.0
def test_fault_33_coco_comes_back_as_the_same_labels(labels: np.ndarray, tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    mask = pytest.importorskip("pycocotools.mask")
    write_coco(tmp_path / "nuclei.json", "image.png", labels)
    data = coco.COCO(tmp_path / "nuclei.json")
    decoded = np.zeros(SHAPE, int)
    annotations = data.loadAnns(data.getAnnIds(imgIds=[1]))
    for annotation in annotations:
        pixels = data.annToMask(annotation).astype(bool)
        assert not decoded[pixels].any()
        decoded[pixels] = annotation["label"]
        assert annotation["area"] == pixels.sum()
        assert annotation["bbox"] == mask.toBbox(data.annToRLE(annotation)).tolist()
    np.testing.assert_array_equal(decoded, labels)
    assert data.loadImgs([1]) == [
        {"id": 1, "file_name": "image.png", "height": SHAPE[0], "width": SHAPE[1]}
    ]


@dtypes
def test_labels_of_any_integer_type_are_written_alike(dtype: type, tmp_path: Path) -> None:
    labels = ring_in_ring().astype(dtype)
    write_rois(tmp_path / "nuclei.zip", labels)
    write_geojson(tmp_path / "nuclei.geojson", labels, {})
    write_coco(tmp_path / "nuclei.json", "image.png", labels)
    np.testing.assert_array_equal(read_rois(tmp_path / "nuclei.zip", SHAPE), labels)
    np.testing.assert_array_equal(read_geojson(tmp_path / "nuclei.geojson", SHAPE), labels)
    assert rle_rows("a", labels) == rle_rows("a", ring_in_ring())


def test_rois_hold_whole_corner_coordinates_under_their_ids(tmp_path: Path) -> None:
    labels = ring_in_ring()
    labels[1:4, 2:8] = 12
    write_rois(tmp_path / "nuclei.zip", labels)
    rois = {roi.name: roi for roi in roifile.roiread(tmp_path / "nuclei.zip")}
    assert list(rois) == ["0002", "0005", "0007", "0012"]
    box = rois["0012"]
    assert (box.left, box.top, box.right, box.bottom) == (2, 1, 8, 4)
    assert sorted(box.coordinates().tolist()) == [[2, 1], [2, 4], [8, 1], [8, 4]]
    assert box.coordinates().dtype.kind == "i"
    rings = rois["0005"].coordinates(multi=True)
    assert len(rings) == 2
    assert all((ring == ring.round()).all() for ring in rings)
    for number, name in ((5, "0005"), (7, "0007")):
        y, x = np.nonzero(labels == number)
        found = np.concatenate(rois[name].coordinates(multi=True))
        assert found.min(axis=0).tolist() == [x.min(), y.min()]
        assert found.max(axis=0).tolist() == [x.max() + 1, y.max() + 1]


def test_rois_far_from_the_corner_of_a_huge_image_keep_their_place(tmp_path: Path) -> None:
    wide = np.zeros((3, 70_000), np.uint8)
    wide[1, 40_000:40_004], wide[2, 69_990:] = 1, 2
    for labels in (wide, wide.T):
        write_rois(tmp_path / "nuclei.zip", labels)
        np.testing.assert_array_equal(read_rois(tmp_path / "nuclei.zip", labels.shape), labels)


def test_geojson_is_what_qupath_reads(tmp_path: Path) -> None:
    labels = np.zeros((9, 9), int)
    labels[1:4, 2:6], labels[5:8, 5:8], labels[6, 6] = 12, 30, 0
    labels[0, 0], labels[1, 1] = 40, 40
    columns = {"Area px": np.array([12, 8, 2]), "Mean": [0.5, np.nan, np.inf]}
    write_geojson(tmp_path / "nuclei.geojson", labels, columns)
    content = json.loads((tmp_path / "nuclei.geojson").read_text())
    assert content["type"] == "FeatureCollection"
    first, holed, _ = content["features"]
    assert first["type"] == "Feature"
    assert first["properties"] == {
        "objectType": "detection",
        "name": "12",
        "measurements": {"Area px": 12.0, "Mean": 0.5},
    }
    assert holed["properties"]["measurements"] == {"Area px": 8.0}
    kinds = [feature["geometry"]["type"] for feature in content["features"]]
    assert kinds == ["Polygon", "Polygon", "MultiPolygon"]
    assert len({feature["id"] for feature in content["features"]}) == 3
    (ring,) = first["geometry"]["coordinates"]
    assert ring[0] == ring[-1]
    assert [shapely.geometry.shape(f["geometry"]).area for f in content["features"]] == [12, 8, 2]
    assert shapely.geometry.shape(first["geometry"]).bounds == (2, 1, 6, 4)


def test_an_image_without_nuclei_has_one_empty_row_of_rle() -> None:
    assert rle_rows("a", np.zeros((2, 2), int)) == [("a", "")]


def test_rle_counts_from_1_down_the_columns() -> None:
    labels = np.array([[0, 4, 0], [4, 4, 0], [4, 0, 0]])
    assert rle_rows("a", labels) == [("a", "2 4")]


def test_planes_of_a_stack_keep_ids_of_their_own(tmp_path: Path) -> None:
    stack = np.zeros((3, 6, 8), np.uint16)
    stack[0, 1:3, 1:3], stack[2, 2:5, 4:8], stack[2, 0, 0] = 1, 1, 7
    write_rois(tmp_path / "nuclei.zip", stack)
    rois = roifile.roiread(tmp_path / "nuclei.zip")
    found = [(roi.name, roi.position, roi.left, roi.top) for roi in rois]
    assert found == [("0001-0001", 1, 1, 1), ("0003-0001", 3, 4, 2), ("0003-0007", 3, 0, 0)]

    write_geojson(tmp_path / "nuclei.geojson", stack, {"Area px": [4, 12, 1]})
    features = json.loads((tmp_path / "nuclei.geojson").read_text())["features"]
    assert [
        (f["geometry"]["plane"]["z"], f["properties"]["name"], f["properties"]["measurements"])
        for f in features
    ] == [(0, "1", {"Area px": 4}), (2, "1", {"Area px": 12}), (2, "7", {"Area px": 1})]
    assert len({f["id"] for f in features}) == 3

    assert [image_id for image_id, _ in rle_rows("a", stack)] == ["a#1", "a#2", "a#3", "a#3"]

    write_coco(tmp_path / "nuclei.json", "stack.tif", stack)
    content = json.loads((tmp_path / "nuclei.json").read_text())
    assert [(image["id"], image["plane"]) for image in content["images"]] == [
        (1, 0),
        (2, 1),
        (3, 2),
    ]
    assert [(a["id"], a["image_id"], a["label"]) for a in content["annotations"]] == [
        (1, 1, 1),
        (2, 3, 1),
        (3, 3, 7),
    ]
    for read, name in ((read_rois, "nuclei.zip"), (read_geojson, "nuclei.geojson")):
        with pytest.raises(InputError, match=r"2 planes"):
            read(tmp_path / name, (6, 8))


def square(roi_type: roifile.ROI_TYPE, **more: Any) -> roifile.ImagejRoi:
    box = {"left": 5, "top": 7, "right": 15, "bottom": 17}
    return roifile.ImagejRoi(roitype=roi_type, **{**box, **more})


def drawn(*points: tuple[float, float]) -> roifile.ImagejRoi:
    return roifile.ImagejRoi.frompoints(np.array(points))


SQUARE = np.zeros(SHAPE, int)
SQUARE[7:17, 5:15] = 1
CORNERS = ((5, 7), (15, 7), (15, 17), (5, 17))
FRACTIONS = {"version": 229, "options": roifile.ROI_OPTIONS.SUB_PIXEL_RESOLUTION}


@pytest.mark.parametrize(
    "roi",
    [
        pytest.param(square(roifile.ROI_TYPE.RECT), id="rectangle"),
        pytest.param(
            square(
                roifile.ROI_TYPE.RECT, **FRACTIONS, xd=4.75, yd=7.25, widthd=10, heightd=9.75
            ),
            id="rectangle with fractions",
        ),
        pytest.param(drawn(*CORNERS), id="freehand"),
        pytest.param(drawn(*CORNERS[::-1]), id="anticlockwise"),
        pytest.param(drawn(*((x + 0.25, y - 0.25) for x, y in CORNERS)), id="fractions"),
    ],
)  # fmt: skip
def test_a_drawn_square_of_10_by_10_is_exactly_100_pixels(roi: roifile.ImagejRoi) -> None:
    np.testing.assert_array_equal(read_rois(roi.tobytes(), SHAPE, "a.roi"), SQUARE)


def test_an_oval_holds_the_pixels_whose_centres_lie_in_the_ellipse() -> None:
    roi = square(roifile.ROI_TYPE.OVAL, right=26)
    y, x = np.indices(SHAPE) + 0.5
    expected = ((x - 15.5) / 10.5) ** 2 + ((y - 12) / 5) ** 2 < 1
    np.testing.assert_array_equal(read_rois(roi.tobytes(), SHAPE, "a.roi"), expected)


def test_random_polygons_hold_the_pixels_that_scikit_image_finds_in_them() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        # No centre lies on an outline, where conventions differ; outlines cross themselves,
        # and reach beyond the image.
        points = rng.uniform((-20, -20), (100, 80), (rng.integers(3, 12), 2))
        labels = read_rois(drawn(*points).tobytes(), SHAPE, "a.roi")
        stored = points.astype(np.float32).astype(float)
        expected = polygon2mask(SHAPE, stored[:, ::-1] - 0.5)
        np.testing.assert_array_equal(labels, expected)


def test_two_nuclei_with_a_common_slanted_edge_share_no_pixel_and_leave_none_out() -> None:
    halves = [drawn((0, 0), (10, 0), (0, 10)), drawn((10, 0), (10, 10), (0, 10))]
    masks = [read_rois(half.tobytes(), (10, 10), "a.roi") for half in halves]
    assert (masks[0] + masks[1] == 1).all()


def archive(**rois: roifile.ImagejRoi) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as entries:
        for name, roi in rois.items():
            entries.writestr(f"{name}.roi", roi.tobytes())
            entries.writestr(f"__MACOSX/._{name}.roi", b"Mac OS X")
    return file.getvalue()


def feature(*points: tuple[float, float], **properties: Any) -> dict[str, Any]:
    geometry = {"type": "Polygon", "coordinates": [[*points, points[0]]]}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


FIRST, SECOND = ((2, 2), (8, 2), (8, 8), (2, 8)), ((5, 5), (12, 5), (12, 12), (5, 12))
OVERLAPPING: dict[str, Callable[[str, str], np.ndarray]] = {
    "ROIs": lambda a, b: read_rois(
        archive(**{a: drawn(*FIRST), b: drawn(*SECOND)}), (20, 20), "a.zip"
    ),
    "GeoJSON": lambda a, b: read_geojson(
        json.dumps([feature(*FIRST, name=a), feature(*SECOND, name=b)]).encode(), (20, 20), "a"
    ),
}


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (("0009", "0004"), (9, 4)),
        (("0005-0005", "0008-0008"), (1, 2)),
        (("3", "nucleus"), (1, 2)),
        (("07", "7"), (1, 2)),
        (("0", "1"), (1, 2)),
        (("12345678901", "1"), (1, 2)),
    ],
)
@pytest.mark.parametrize("form", OVERLAPPING)
def test_names_that_are_different_numbers_are_ids_and_overlaps_stay_with_the_first(
    form: str, names: tuple[str, str], ids: tuple[int, int]
) -> None:
    expected = np.zeros((20, 20), int)
    expected[5:12, 5:12] = ids[1]
    expected[2:8, 2:8] = ids[0]
    np.testing.assert_array_equal(OVERLAPPING[form](*names), expected)


def test_geojson_reads_lists_features_and_the_nuclei_of_cells() -> None:
    outline = feature(*CORNERS)
    cell = feature(*((2 * x, 2 * y) for x, y in CORNERS), objectType="cell")
    cell["nucleusGeometry"] = outline["geometry"]
    nowhere = {**outline, "geometry": None, "nucleusGeometry": outline["geometry"]}
    for content in (outline, [outline], {"type": "FeatureCollection", "features": [cell]}, nowhere):
        labels = read_geojson(json.dumps(content).encode(), SHAPE, "a.geojson")
        np.testing.assert_array_equal(labels, SQUARE)


def test_an_outline_drawn_by_opencv_around_pixels_is_not_shifted() -> None:
    mask = np.zeros(SHAPE, np.uint8)
    cv2.ellipse(mask, (40, 30), (17, 9), 25, 0, 360, 1, -1)
    # Enlarged eightfold, the outline of outer pixels lies within an eighth of the true corners.
    large = np.kron(mask, np.ones((8, 8), np.uint8))
    (contour,), _ = cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    points = (contour[:, 0] + 0.5) / 8
    labels = read_geojson(json.dumps(feature(*points.tolist())).encode(), SHAPE, "a.geojson")
    np.testing.assert_array_equal(labels, mask)


GOOD_ROI = drawn(*CORNERS).tobytes()
GOOD_ZIP = archive(a=drawn(*CORNERS))
GOOD_JSON = json.dumps([feature(*CORNERS)]).encode()


def with_coordinate(value: Any) -> bytes:
    return json.dumps([feature((value, 1), (3, 1), (3, 4))]).encode()


@pytest.mark.parametrize(
    ("read", "data", "message"),
    [
        (read_rois, b"", "no ImageJ ROIs, or damaged"),
        (read_rois, b"\x89PNG" * 100, "no ImageJ ROIs, or damaged"),
        (read_rois, GOOD_ROI[:70], "no ImageJ ROIs, or damaged"),
        (read_rois, GOOD_ZIP[:-30], "no ImageJ ROIs, or damaged"),
        (read_rois, GOOD_ZIP[:90] + b"!!!!" + GOOD_ZIP[94:], "no ImageJ ROIs, or damaged"),
        (read_rois, square(roifile.ROI_TYPE.POINT).tobytes(), "of type point"),
        (read_rois, square(roifile.ROI_TYPE.LINE).tobytes(), "of type line"),
        (
            read_rois,
            square(roifile.ROI_TYPE.RECT, subtype=roifile.ROI_SUBTYPE.TEXT).tobytes(),
            "of type text",
        ),
        (
            read_rois,
            archive(
                a=square(roifile.ROI_TYPE.RECT, position=1),
                b=square(roifile.ROI_TYPE.OVAL, position=2),
            ),
            "2 planes",
        ),
        (read_geojson, b"", "no GeoJSON, or damaged"),
        (read_geojson, GOOD_JSON[:-20], "no GeoJSON, or damaged"),
        (read_geojson, b"\xff\xfe\x00", "no GeoJSON, or damaged"),
        (read_geojson, b"3", "no GeoJSON, or damaged"),
        (read_geojson, b'{"images": []}', "no GeoJSON features"),
        (read_geojson, with_coordinate("x"), "no GeoJSON, or damaged"),
        (read_geojson, with_coordinate(float("nan")), "no number"),
        (read_geojson, with_coordinate([1, 2]), "no GeoJSON, or damaged"),
        (
            read_geojson,
            b'{"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}}',
            "feature 1 is no area but of type Point",
        ),
        (
            read_geojson,
            json.dumps(
                [
                    feature((0, 0), (20, 0), (20, 20), (0, 20), objectType="annotation"),
                    feature(*FIRST, objectType="detection"),
                ]
            ).encode(),
            "outline 2 lies within outline 1; delete the one that is no nucleus of its own",
        ),
        (  # its halves were added, and the nucleus not deleted
            read_rois,
            archive(
                whole=square(roifile.ROI_TYPE.RECT),
                half=square(roifile.ROI_TYPE.RECT, right=10),
            ),
            r"outline 2 \(half\) lies within outline 1 \(whole\); delete",
        ),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(
    read: Callable[..., Any], data: bytes, message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        read(data, SHAPE, "folder/file")
    assert str(error.value).startswith("folder/file: ")
    assert "\n" not in str(error.value)


def test_an_annotation_beside_detections_is_a_nucleus_that_was_added() -> None:
    features = [feature(*FIRST, objectType="detection"), feature(*SECOND, objectType="annotation")]
    labels = read_geojson(json.dumps(features).encode(), (20, 20), "a.geojson")
    expected = [feature(*FIRST), feature(*SECOND)]
    np.testing.assert_array_equal(
        labels, read_geojson(json.dumps(expected).encode(), (20, 20), "a.geojson")
    )
    assert labels.max() == 2


def test_an_archive_without_rois_is_refused_but_an_empty_one_has_no_nuclei() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as entries:
        entries.writestr("notes.txt", "nothing")
    with pytest.raises(InputError, match="without ROIs"):
        read_rois(file.getvalue(), SHAPE, "a.zip")
    assert not read_rois(archive(), SHAPE, "a.zip").any()


def _rois(*places: dict[str, int]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as entries:
        for number, place in enumerate(places):
            corners = np.array([(0, 0), (4, 0), (4, 4), (0, 4)]) + 10 * number
            roi = roifile.ImagejRoi.frompoints(corners)
            for name, at in place.items():
                setattr(roi, name, at)
            entries.writestr(f"{number}.roi", roi.tobytes())
    return file.getvalue()


def test_outlines_on_every_plane_go_with_those_of_one() -> None:
    assert read_rois(_rois({}, {"position": 3}, {"position": 3}), (60, 80)).max() == 3


@pytest.mark.parametrize("name", ["position", "z_position", "t_position"])
def test_outlines_of_two_planes_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="2 planes of a stack"):
        read_rois(_rois({name: 1}, {name: 2}), (60, 80))


@pytest.mark.parametrize("name", ["z", "t"])
def test_geojson_of_two_planes_is_refused(name: str) -> None:
    ring = [[0, 0], [4, 0], [4, 4], [0, 0]]
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring], "plane": {name: at}},
        }
        for at in (0, 1)
    ]
    with pytest.raises(InputError, match="2 planes of a stack"):
        read_geojson(json.dumps(features).encode(), (60, 80))
