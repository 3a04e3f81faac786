from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.draw import disk

from cellseg.instances import decode

DISCS = [((20, 20), 9), ((20, 50), 12), ((60, 30), 15), ((70, 74), 20), ((5, 90), 3)]


def drawn() -> NDArray[np.int64]:
    labels = np.zeros((80, 100), np.int64)
    for number, (centre, radius) in enumerate(DISCS, 1):
        labels[disk(centre, radius, shape=labels.shape)] = number
    return labels


def dots(number: int) -> NDArray[np.float32]:
    probs = np.zeros((520, 520), np.float32)
    probs[::2, ::2].flat[np.arange(number)] = 1
    return probs


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_drawn_discs_come_back_one_by_one(dtype: type) -> None:
    labels = drawn()
    found = decode(np.where(labels > 0, 0.9, 0.2).astype(dtype))
    assert found.shape == labels.shape
    pairs = set(zip(labels.flat, found.flat, strict=True))
    assert len(pairs) == len(DISCS) + 1  # one number for each disc
    assert (0, 0) in pairs
    assert {number for _, number in pairs} == set(range(len(DISCS) + 1))


@pytest.mark.parametrize("corner", [(3, 3), (3, 0)])
def test_nuclei_that_touch_at_a_corner_are_one(corner: tuple[int, int]) -> None:
    probs = np.zeros((8, 8))
    probs[1:3, 1:3] = 1
    assert decode(probs).max() == 1
    probs[corner] = 1
    assert decode(probs).max() == 1
    assert decode(probs)[corner] == 1


def test_a_gap_of_one_pixel_parts_nuclei() -> None:
    probs = np.zeros((5, 5))
    probs[:, [1, 3]] = 1
    assert decode(probs).max() == 2


@pytest.mark.parametrize("shape", [(12, 17), (1, 1), (1, 500)])
def test_an_empty_map_gives_zeros_of_its_shape(shape: tuple[int, int]) -> None:
    labels = decode(np.full(shape, 0.4, np.float32))
    assert labels.dtype == np.uint16
    assert labels.shape == shape
    assert not labels.any()


@pytest.mark.parametrize(("threshold", "count"), [(0.1, 4), (0.25, 3), (0.5, 2), (0.75, 1), (1, 0)])
def test_foreground_lies_above_the_threshold(threshold: float, count: int) -> None:
    probs = np.array([[0.25, 0, 0.5, 0, 0.75, 0, 1]])
    assert decode(probs, threshold).max() == count


def test_the_threshold_is_one_half_by_default() -> None:
    np.testing.assert_array_equal(decode(np.array([[0.5, 0, 0.501]])), [[0, 0, 1]])


@pytest.mark.parametrize(
    ("number", "dtype"), [(65_535, np.uint16), (65_536, np.uint32), (67_600, np.uint32)]
)
def test_more_than_65535_nuclei_get_labels_of_32_bits(number: int, dtype: type) -> None:
    probs = dots(number)
    labels = decode(probs)
    assert labels.dtype == dtype
    np.testing.assert_array_equal(np.unique(labels), np.arange(number + 1))
    np.testing.assert_array_equal(labels > 0, probs > 0)
