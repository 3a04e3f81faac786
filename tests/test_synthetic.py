from __future__ import annotations

import numpy as np
import pytest
from skimage.measure import label

from cellseg.data.synthetic import LOOKS, MIN_AREA, generate

SERIES = [generate(number, size=128) for number in range(12)]


def test_an_image_depends_on_its_arguments_alone() -> None:
    for number in (7, 2, 0):
        for again, before in zip(generate(number, size=128), SERIES[number], strict=True):
            np.testing.assert_array_equal(again, before)


@pytest.mark.parametrize(("number", "seed"), [(1, 0), (0, 1)])
def test_another_number_or_seed_gives_other_nuclei(number: int, seed: int) -> None:
    _, labels = generate(number, seed, size=128)
    assert np.any((labels > 0) != (SERIES[0][1] > 0))


@pytest.mark.parametrize("size", [64, 65, 128, 300])
@pytest.mark.parametrize("look", LOOKS)
def test_any_size_gives_whole_nuclei_with_consecutive_ids(size: int, look: str) -> None:
    for number in range(4):
        image, labels = generate(number, seed=3, size=size, look=look)
        assert image.shape == (size, size, 3)
        assert labels.shape == (size, size)
        assert [image.dtype, labels.dtype] == [np.uint8, np.uint16]
        areas = np.bincount(labels.ravel())[1:]
        assert len(areas) > 0
        assert areas.min() >= MIN_AREA
        assert label(labels, connectivity=1).max() == len(areas)


def test_nuclei_touch_in_most_images() -> None:
    touching = [
        np.any((one != other) & (one > 0) & (other > 0))
        for _, labels in SERIES
        for one, other in [(labels[1:], labels[:-1])]
    ]
    assert np.mean(touching) > 0.5


def test_fluorescence_is_grey_with_bright_nuclei() -> None:
    for number, (_, labels) in enumerate(SERIES):
        image, same = generate(number, size=128, look="fluorescence")
        np.testing.assert_array_equal(same, labels)
        assert np.ptp(image, axis=2).max() == 0
        assert image[labels > 0].mean() > image[labels == 0].mean() + 10


def test_histology_is_coloured_with_dark_nuclei() -> None:
    for number, (_, labels) in enumerate(SERIES):
        image, same = generate(number, size=128, look="histology")
        np.testing.assert_array_equal(same, labels)
        assert np.ptp(image, axis=2).mean() > 10
        assert image[labels > 0].mean() < image[labels == 0].mean() - 10


def test_every_third_image_is_histology_by_default() -> None:
    grey = [np.ptp(image, axis=2).max() == 0 for image, _ in SERIES]
    assert grey == [True, True, False] * 4
