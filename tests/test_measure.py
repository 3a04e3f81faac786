from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt, gaussian_filter
from skimage.measure import regionprops_table

from cellseg.data.synthetic import generate
from cellseg.predict.measure import header_names, measure

RNG = np.random.default_rng(0)

# Our column: the property of scikit-image.
SAME = {
    "label": "label",
    "centroid_y_px": "centroid-0",
    "centroid_x_px": "centroid-1",
    "bbox_top_px": "bbox-0",
    "bbox_left_px": "bbox-1",
    "bbox_bottom_px": "bbox-2",
    "bbox_right_px": "bbox-3",
    "area_px": "area",
    "perimeter_px": "perimeter_crofton",
    "major_axis_px": "axis_major_length",
    "minor_axis_px": "axis_minor_length",
    "feret_px": "feret_diameter_max",
    "eccentricity": "eccentricity",
    "solidity": "solidity",
    "equivalent_diameter_px": "equivalent_diameter_area",
    "mean_red": "intensity_mean-0",
    "min_red": "intensity_min-0",
    "max_red": "intensity_max-0",
    "mean_blue": "intensity_mean-2",
    "min_blue": "intensity_min-2",
    "max_blue": "intensity_max-2",
}
RGB = ("red", "green", "blue")


def shape(mask: Any, **options: Any) -> dict[str, Any]:
    """The measurements of the one nucleus of a mask."""
    labels = np.asarray(mask, np.uint16)
    columns = measure(labels, np.zeros((*labels.shape, 0), np.uint8), (), **options)
    assert all(len(values) == 1 for values in columns.values())
    return {name: values[0] for name, values in columns.items()}


def disc(radius: float, y: float = 0, x: float = 0) -> np.ndarray:
    side = np.arange(-int(radius) - 3, int(radius) + 4)
    return np.hypot(side[:, None] - y, side - x) <= radius


def fragments() -> np.ndarray:
    """400 ragged shapes, many with holes or in several pieces with rows between them."""
    labels = np.zeros((400, 400), np.uint32)
    for number in range(400):
        y, x = 20 * (number // 20), 20 * (number % 20)
        noise = gaussian_filter(RNG.standard_normal((20, 20)), RNG.uniform(0.3, 3))
        mask = noise > np.quantile(noise, RNG.uniform(0.3, 0.98))
        labels[y : y + 20, x : x + 20][mask] = number + 1
    return labels


SCENES = {"bright": generate(0), "stained": generate(2), "crowded": generate(27)}
SCENES["fragments"] = (RNG.integers(0, 256, (400, 400, 3)).astype(np.uint8), fragments())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("scene", SCENES)
def test_the_values_are_those_of_scikit_image(scene: str, dtype: type) -> None:
    image, labels = SCENES[scene]
    pixels = (image * (1 if dtype == np.uint8 else 37.25)).astype(dtype)
    columns = measure(labels, pixels, RGB)
    properties = sorted({name.split("-")[0] for name in SAME.values()})
    expected = regionprops_table(labels, pixels.astype(np.float64), properties=properties)
    assert len(columns["label"]) == labels.max() > 5
    for name, theirs in SAME.items():
        np.testing.assert_allclose(
            columns[name], expected[theirs], rtol=1e-9, atol=1e-9, err_msg=name
        )
    np.testing.assert_allclose(
        columns["integrated_green"], expected["area"] * columns["mean_green"], rtol=1e-12
    )


@pytest.mark.parametrize("radius", [4.0, 8.3, 15.5, 40.0])
def test_a_disc_measures_as_the_circle_it_is_drawn_from(radius: float) -> None:
    centres = np.random.default_rng(1).uniform(-0.5, 0.5, (30, 2))
    discs = [shape(disc(radius, y, x)) for y, x in centres]
    found = {name: np.array([each[name] for each in discs]) for name in discs[0]}
    np.testing.assert_allclose(found["area_px"], np.pi * radius**2, rtol=0.4 / radius)
    for name in ("equivalent_diameter_px", "major_axis_px", "minor_axis_px"):
        np.testing.assert_allclose(found[name], 2 * radius, atol=0.8, err_msg=name)
    assert found["perimeter_px"].mean() == pytest.approx(2 * np.pi * radius, rel=0.015)
    assert 0.98 < found["circularity"].mean() <= 1
    assert found["circularity"].min() > 0.92 and found["circularity"].max() <= 1
    # Between the outer edges of pixels it is a little longer than between points of the circle.
    excess = found["feret_px"] - 2 * radius
    assert excess.min() > 0 and excess.max() < 1.7
    assert found["solidity"].min() > 0.9


def test_a_rectangle_has_its_sides_and_second_moments() -> None:
    labels = np.zeros((40, 50), np.uint16)
    labels[10:22, 5:41] = 1  # 12 x 36
    found = shape(labels)
    assert (found["centroid_y_px"], found["centroid_x_px"]) == (15.5, 22.5)
    box = [found[f"bbox_{side}_px"] for side in ("top", "left", "bottom", "right")]
    assert box == [10, 5, 22, 41]
    assert (found["area_px"], found["solidity"]) == (12 * 36, 1)
    # A side of n pixels has the variance (n^2 - 1) / 12; an ellipse's axis is 4 deviations.
    assert found["major_axis_px"] == pytest.approx(4 * np.sqrt((36**2 - 1) / 12))
    assert found["minor_axis_px"] == pytest.approx(4 * np.sqrt((12**2 - 1) / 12))
    assert found["eccentricity"] == pytest.approx(np.sqrt(1 - (12**2 - 1) / (36**2 - 1)))
    assert found["feret_px"] == pytest.approx(np.hypot(11, 36))  # from edge to edge


def test_one_pixel_has_finite_measurements() -> None:
    found = shape(np.pad([[1]], 2))
    assert np.isfinite(list(found.values())).all()
    assert found["area_px"] == found["feret_px"] == found["solidity"] == found["circularity"] == 1
    assert found["major_axis_px"] == found["minor_axis_px"] == found["eccentricity"] == 0


@pytest.mark.parametrize("line", [np.ones((1, 30)), np.ones((30, 1)), np.eye(30)])
def test_a_line_is_as_eccentric_as_can_be(line: np.ndarray) -> None:
    for mask in (line, line[::-1], np.pad(line, 1)):
        found = shape(mask)
        assert np.isfinite(list(found.values())).all()
        assert found["eccentricity"] == pytest.approx(1)
        assert found["minor_axis_px"] == pytest.approx(0, abs=1e-6)
        assert found["feret_px"] == pytest.approx(np.hypot(*line.shape), abs=1.5)
        assert found["circularity"] < 0.2
        assert found["solidity"] == 1


def test_pixels_in_a_row_have_no_width_whatever_the_rounding() -> None:
    mask = np.zeros((15, 43))
    mask[range(15), range(0, 43, 3)] = 1  # its smaller variance computes as -1e-14
    found = shape(mask)
    assert found["minor_axis_px"] == 0
    assert found["eccentricity"] == 1


def test_a_dent_makes_a_nucleus_less_solid() -> None:
    mask = np.ones((20, 20), bool)
    mask[5:15, 10:] = False
    assert shape(mask)["solidity"] == 0.75
    assert shape(mask.T)["solidity"] == shape(mask[:, ::-1])["solidity"] == 0.75


def test_a_nucleus_that_fills_the_image_is_measured_to_its_border() -> None:
    found = shape(np.ones((7, 9)))
    assert (found["area_px"], found["touches_border"]) == (63, 1)
    assert found["perimeter_px"] == shape(np.pad(np.ones((7, 9)), 3))["perimeter_px"]


def test_touching_the_border_is_marked_on_each_side_and_one_pixel_off_is_not() -> None:
    labels = np.zeros((20, 30), np.uint16)
    spots = [(0, 5), (19, 5), (5, 0), (5, 29), (1, 10), (18, 10), (10, 1), (10, 28)]
    for number, spot in enumerate(spots, start=1):
        labels[spot] = number
    columns = measure(labels, np.zeros((20, 30, 0)), ())
    assert columns["touches_border"].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_a_pixel_size_adds_the_same_in_micrometres() -> None:
    found = shape(disc(8), pixel_size=0.25)
    assert found["area_um2"] == pytest.approx(found["area_px"] / 16)
    for name in ("perimeter", "major_axis", "minor_axis", "feret", "equivalent_diameter"):
        assert found[f"{name}_um"] == pytest.approx(found[f"{name}_px"] / 4), name
    assert not [name for name in shape(disc(8)) if name.endswith(("_um", "_um2"))]


def test_nan_and_infinite_pixels_do_not_count() -> None:
    labels = np.array([[1, 1, 1, 2, 2, 3]], np.uint16)
    pixels = np.array([[5, np.nan, 2, np.nan, np.nan, 1], [7, 8, np.inf, 0, -1, 4]], np.float32)
    columns = measure(labels, pixels.T[None], ("a", "b"))
    expected = {
        "mean_a": [3.5, np.nan, 1], "min_a": [2, np.nan, 1],
        "max_a": [5, np.nan, 1], "integrated_a": [7, np.nan, 1],
        "mean_b": [7.5, -0.5, 4], "min_b": [7, -1, 4],
        "max_b": [8, 0, 4], "integrated_b": [15, -1, 4],
    }  # fmt: skip
    for name, values in expected.items():
        np.testing.assert_array_equal(columns[name], values, err_msg=name)


def test_sums_of_bright_16_bit_nuclei_do_not_overflow() -> None:
    pixels = np.full((300, 300, 1), 65535, np.uint16)
    columns = measure(np.ones((300, 300), np.uint16), pixels, ("a",))
    assert columns["integrated_a"][0] == 65535 * 90000
    assert columns["mean_a"][0] == 65535


@pytest.mark.parametrize(("expand", "pixel_size"), [(3.0, None), (1.5, 0.5), (0.7, 0.3)])
def test_a_ring_is_the_background_that_lies_near_its_nucleus_and_nearest_to_it(
    expand: float, pixel_size: float | None
) -> None:
    image, labels = generate(27)
    columns = measure(labels, image, RGB, pixel_size=pixel_size, expand=expand)
    away = np.stack(
        [distance_transform_edt(labels != number) for number in range(1, labels.max() + 1)]
    )
    near = (labels == 0) & (away <= expand / (pixel_size or 1))
    contested = (away == away.min(axis=0)).sum(axis=0) > 1  # equally near: either may have it
    rings = near & (away == away.min(axis=0))
    assert columns["ring_area_px"].sum() == rings.any(axis=0).sum() > 0
    alone = ~(rings & contested).any(axis=(1, 2)) & rings.any(axis=(1, 2))
    assert alone.sum() > 3
    for index in np.flatnonzero(alone):
        values = image[rings[index]].astype(float)
        assert columns["ring_area_px"][index] == len(values)
        for channel, name in enumerate(RGB):
            seen = [
                columns[f"ring_{what}_{name}"][index]
                for what in ("mean", "min", "max", "integrated")
            ]
            column = values[:, channel]
            expected = [column.mean(), column.min(), column.max(), column.sum()]
            np.testing.assert_allclose(seen, expected)


def test_a_nucleus_without_room_has_an_empty_ring() -> None:
    labels = np.pad(np.full((1, 1), 2, np.uint16), 1, constant_values=1)
    columns = measure(labels, np.ones((3, 3, 1), np.uint8), ("a",), expand=2)
    assert columns["ring_area_px"].tolist() == [0, 0]
    assert np.isnan(columns["ring_mean_a"]).all()


def test_confidence_is_the_mean_probability_within_the_nucleus() -> None:
    _, labels = generate(0)
    probs = RNG.random(labels.shape).astype(np.float32)
    columns = measure(labels, np.zeros((*labels.shape, 0)), (), probs)
    expected = [probs[labels == number].mean(dtype=float) for number in columns["label"]]
    np.testing.assert_allclose(columns["confidence"], expected)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"pixel_size": 0.5},
    {"expand": 2.0},
    {"pixel_size": 0.5, "expand": 2.0},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("confident", [False, True])
def test_an_image_without_nuclei_has_the_same_empty_columns(
    options: dict[str, Any], confident: bool
) -> None:
    image, labels = generate(0)
    probs = np.ones(labels.shape, np.float32) if confident else None
    full = measure(labels, image, RGB, probs, **options)
    empty = measure(np.zeros_like(labels), image, RGB, probs, **options)
    assert list(full) == list(empty)
    for name, values in full.items():
        assert len(values) == labels.max(), name
        assert empty[name].shape == (0,), name
        assert empty[name].dtype == values.dtype, name
    assert ("confidence" in full) == confident
    assert ("area_um2" in full) == ("pixel_size" in options)
    assert ("ring_area_px" in full) == ("expand" in options)


def test_columns_come_in_the_order_of_the_table() -> None:
    found = measure(
        np.ones((3, 3), np.uint16),
        np.ones((3, 3, 1), np.uint8),
        ("DAPI",),
        np.ones((3, 3), np.float32),
        pixel_size=0.5,
        expand=1,
    )
    assert list(found) == [
        "label", "centroid_y_px", "centroid_x_px",
        "bbox_top_px", "bbox_left_px", "bbox_bottom_px", "bbox_right_px",
        "area_px", "perimeter_px", "major_axis_px", "minor_axis_px", "feret_px",
        "eccentricity", "solidity", "circularity", "equivalent_diameter_px",
        "area_um2", "perimeter_um", "major_axis_um", "minor_axis_um", "feret_um",
        "equivalent_diameter_um",
        "mean_DAPI", "min_DAPI", "max_DAPI", "integrated_DAPI",
        "ring_area_px", "ring_mean_DAPI", "ring_min_DAPI", "ring_max_DAPI", "ring_integrated_DAPI",
        "confidence", "touches_border",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        (["DAPI", "Alexa 488"], ["DAPI", "Alexa_488"]),
        (["5 \N{MICRO SIGN}M", "5 \N{GREEK SMALL LETTER MU}M"], ["5_uM", "5_uM_1"]),
        (["caf\N{LATIN SMALL LETTER E WITH ACUTE}", "a,b;c\n\td"], ["cafe", "a_b_c_d"]),
        (["", "  ", "\N{GREEK SMALL LETTER ALPHA}", "x"], ["0", "1", "2", "x"]),
        (["a", "a", "a_2", "a"], ["a", "a_1", "a_2", "a_3"]),
        (["a", "a_3", "a"], ["a", "a_3", "a_2"]),
        (["\N{CYRILLIC CAPITAL LETTER DE}", "1", "2"], ["0", "1", "2"]),
        (["=1+2", "-x"], ["1_2", "x"]),
    ],
)
def test_channel_names_become_unique_ascii_headers(
    channels: list[str], expected: list[str]
) -> None:
    assert header_names(channels) == expected


def test_names_and_channels_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="argument"):
        measure(np.ones((3, 3), np.uint16), np.ones((3, 3, 2)), ("a",))
