from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.draw import disk

from cellseg.data.synthetic import generate
from cellseg.instances import Decoding, borders, decode, encode
from cellseg.metrics import compare

DISCS = [((20, 20), 9), ((20, 50), 12), ((60, 30), 15), ((70, 74), 20), ((5, 90), 3)]


def drawn() -> NDArray[np.int64]:
    labels = np.zeros((80, 100), np.int64)
    for number, (centre, radius) in enumerate(DISCS, 1):
        labels[disk(centre, radius, shape=labels.shape)] = number
    return labels


def dots(number: int) -> NDArray[np.float32]:
    probs = np.zeros((1, 520, 520), np.float32)
    probs[0, ::2, ::2].flat[np.arange(number)] = 1
    return probs


ALL = Decoding(min_area=0)


def test_contours_are_where_two_nuclei_are_within_five_pixels() -> None:
    for number in range(7, 10):
        labels = generate(number, size=48)[1]
        expected = np.zeros((2, *labels.shape), np.uint8)
        for y, x in np.ndindex(labels.shape):
            window = labels[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
            expected[:, y, x] = labels[y, x] > 0, len(np.setdiff1d(window, 0)) > 1
        np.testing.assert_array_equal(encode(labels), expected)


def test_maps_do_not_depend_on_the_numbers_of_the_nuclei() -> None:
    labels = generate(7)[1].astype(np.int64)
    assert encode(labels)[1].any()
    numbers = np.random.default_rng(0).permutation(2**40 + np.arange(labels.max() + 1))
    numbers[0] = 0
    np.testing.assert_array_equal(encode(labels), encode(numbers[labels]))


def test_borders_are_the_closed_form_of_the_paper() -> None:
    labels = generate(7, size=48)[1]
    y, x = np.indices(labels.shape)
    expected = np.zeros(labels.shape)
    for place in zip(*np.nonzero(labels == 0), strict=True):
        apart = np.hypot(y - place[0], x - place[1])
        d1, d2 = sorted(apart[labels == n].min() for n in np.unique(labels)[1:])[:2]
        expected[place] = np.exp(-((d1 + d2) ** 2) / (2 * 5**2))
    assert expected.max() > 0.5
    np.testing.assert_allclose(borders(labels), expected, atol=1e-3)


@pytest.mark.parametrize("number", [0, 1])
def test_without_two_nuclei_there_is_no_border(number: int) -> None:
    labels = np.zeros((9, 12), np.uint16)
    labels[2:5, 3:6] = number
    assert not borders(labels).any()


def test_no_nuclei_give_empty_maps() -> None:
    assert not encode(np.zeros((5, 7), np.uint16)).any()


def test_touching_nuclei_come_back_one_by_one() -> None:
    for number in range(8):
        labels = generate(number)[1]
        sums = compare(labels, decode(encode(labels).astype(np.float32), ALL))
        assert sums["matched90"] / sums["true"] > 0.95, number


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("maps", [1, 2])
def test_drawn_discs_come_back_one_by_one(dtype: type, maps: int) -> None:
    labels = drawn()
    probs = np.stack([np.where(labels > 0, 0.9, 0.2), np.full(labels.shape, 0.1)])
    found = decode(probs[:maps].astype(dtype))
    assert found.shape == labels.shape
    pairs = set(zip(labels.flat, found.flat, strict=True))
    assert len(pairs) == len(DISCS) + 1  # one number for each disc
    assert (0, 0) in pairs
    assert {number for _, number in pairs} == set(range(len(DISCS) + 1))


def test_a_contour_parts_two_nuclei_and_belongs_to_them() -> None:
    maps = np.zeros((2, 9, 21))
    maps[0, 2:7, 2:19] = 0.9
    assert decode(maps, ALL).max() == 1
    maps[1, 2:7, 10] = 0.8
    labels = decode(maps, ALL)
    assert labels.max() == 2
    np.testing.assert_array_equal(labels > 0, maps[0] > 0.5)
    assert len(set(labels[2:7, 2:10].flat)) == len(set(labels[2:7, 11:19].flat)) == 1
    # Too faint a contour, or too low a marker level, parts nothing.
    assert decode(maps, Decoding(marker=0.05, min_area=0)).max() == 1


@pytest.mark.parametrize("valley", [10, 16, 20])
def test_nuclei_part_where_the_interior_is_lowest(valley: int) -> None:
    maps = np.zeros((2, 12, 32))
    maps[0, 1:11, 1:31] = 1
    columns = np.arange(1, 31)
    slope = np.where(columns < valley, columns / valley, (31 - columns) / (31 - valley))
    maps[1, 1:11, 1:31] = 0.9 * slope  # 0 at both ends
    labels = decode(maps, Decoding(marker=0.8, min_area=1, min_confidence=0))
    first, second = (np.flatnonzero((labels == number).any(axis=0)) for number in (1, 2))
    assert labels.max() == 2
    assert first[-1] + 1 == second[0]
    assert abs(second[0] - valley) <= 1


@pytest.mark.parametrize("corner", [(3, 3), (3, 0)])
def test_nuclei_that_touch_at_a_corner_are_one(corner: tuple[int, int]) -> None:
    probs = np.zeros((1, 8, 8))
    probs[0, 1:3, 1:3] = 1
    assert decode(probs, ALL).max() == 1
    probs[0][corner] = 1
    assert decode(probs, ALL).max() == 1
    assert decode(probs, ALL)[corner] == 1


def test_a_gap_of_one_pixel_parts_nuclei() -> None:
    probs = np.zeros((1, 5, 5))
    probs[0][:, [1, 3]] = 1
    assert decode(probs, ALL).max() == 2


def test_small_nuclei_are_dropped_and_the_others_numbered_without_gaps() -> None:
    probs = np.zeros((1, 5, 30))
    for start, width in ((0, 3), (5, 1), (8, 2), (12, 4)):
        probs[0, :, start : start + width] = 1
    for least, count in ((0, 4), (5, 4), (6, 3), (10, 3), (11, 2), (21, 0)):
        labels = decode(probs, Decoding(min_area=least))
        np.testing.assert_array_equal(np.unique(labels), np.arange(count + 1))


@pytest.mark.parametrize("maps", [1, 2])
def test_nuclei_of_low_mean_probability_are_dropped(maps: int) -> None:
    probs = np.zeros((2, 5, 30), np.float32)
    probs[0, :, 0:3] = 0.6
    probs[0, :, 5:7] = [0.55, 0.95]  # 0.75 on average, and 0.95 at its best
    probs[0, :, 10:14] = 0.9
    for level, kept in ((0, [1, 6, 11]), (0.59, [1, 6, 11]), (0.61, [6, 11]), (0.74, [6, 11]),
                        (0.76, [11]), (1, [])):  # fmt: skip
        labels = decode(probs[:maps], Decoding(min_area=0, min_confidence=level))
        np.testing.assert_array_equal(labels[2, kept], np.arange(1, len(kept) + 1))
        assert labels.max() == len(kept)


@pytest.mark.parametrize("shape", [(12, 17), (1, 1), (1, 500)])
@pytest.mark.parametrize("maps", [1, 2])
def test_an_empty_map_gives_zeros_of_its_shape(shape: tuple[int, int], maps: int) -> None:
    labels = decode(np.full((maps, *shape), 0.4, np.float32))
    assert labels.dtype == np.uint16
    assert labels.shape == shape
    assert not labels.any()


@pytest.mark.parametrize(("threshold", "count"), [(0.1, 4), (0.25, 3), (0.5, 2), (0.75, 1), (1, 0)])
def test_foreground_lies_above_the_threshold(threshold: float, count: int) -> None:
    probs = np.array([[[0.25, 0, 0.5, 0, 0.75, 0, 1]]])
    assert decode(probs, Decoding(threshold=threshold, min_area=0)).max() == count


def test_the_threshold_is_one_half_by_default() -> None:
    np.testing.assert_array_equal(decode(np.array([[[0.5, 0, 0.501]]]), ALL), [[0, 0, 1]])


@pytest.mark.parametrize(
    "levels",
    [
        {"threshold": 1.5},
        {"threshold": -0.1},
        {"marker": -2},
        {"marker": 1.1},
        {"min_area": -1},
        {"min_confidence": 1.1},
        {"min_confidence": -0.1},
    ],
)
def test_levels_out_of_range_are_refused(levels: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"decode.{next(iter(levels))}"):
        Decoding(**levels)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("number", "dtype"), [(65_535, np.uint16), (65_536, np.uint32), (67_600, np.uint32)]
)
def test_more_than_65535_nuclei_get_labels_of_32_bits(number: int, dtype: type) -> None:
    probs = dots(number)
    for maps in (probs, np.concatenate([probs, 0 * probs])):
        labels = decode(maps, ALL)
        assert labels.dtype == dtype
        np.testing.assert_array_equal(np.unique(labels), np.arange(number + 1))
        np.testing.assert_array_equal(labels > 0, probs[0] > 0)


@pytest.mark.parametrize(
    ("sides", "share"),
    [(["val"], 0.985), pytest.param(["train", "val"], 0.99, marks=pytest.mark.slow)],
)
def test_real_nuclei_survive_the_round_trip(sides: list[str], share: float) -> None:
    root = Path(__file__).parents[2] / "shared/data/dsb2018"
    if not root.is_dir():
        pytest.skip("the real images are not there")
    from cellseg.data.cache import read_sample
    from cellseg.data.folders import find_samples, open_tree
    from cellseg.data.groups import dsb2018

    tree = open_tree(root)
    samples = [s for s in find_samples(tree)[0] if dsb2018()[s.id]["split"] in sides]
    total, kept = 0.0, 0.0
    for sample in samples:
        labels = read_sample(tree, sample)[1]
        sums = compare(labels, decode(encode(labels).astype(np.float32), ALL))
        total, kept = total + sums["true"], kept + sums["matched90"]
    assert total == sum(int(dsb2018()[sample.id]["n_nuclei"]) for sample in samples)
    assert kept / total >= share


def test_areas_are_meant_on_the_grid_of_an_enlarged_image() -> None:
    # A nucleus of 5 x 6 px is one of 120 px where the network sees it twice as large.
    assert Decoding(min_area=120).at(2).min_area == 30
    assert Decoding(min_area=30).at(0.5).min_area == 120


def test_a_nucleus_floods_foreground_that_it_touches_at_a_corner() -> None:
    maps = np.zeros((2, 8, 8))
    maps[0, 1:4, 1:4] = 1
    maps[:, 4, 4] = 0.7, 0.5  # no marker of its own
    np.testing.assert_array_equal(decode(maps, Decoding(min_area=0)), maps[0] > 0.5)
