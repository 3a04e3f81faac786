from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage.draw import disk

import cellseg
from cellseg.adapt import factor_for, is_bright, median_diameter, rescale, to_grid
from cellseg.data.synthetic import generate
from cellseg.metrics import compare, scores
from cellseg.predict.segmenter import Segmentation, Segmenter


@pytest.mark.parametrize(
    ("diameter", "factor"),
    [
        (3, 3),
        (8, 3),
        (10, 2),
        (12, 1),
        (20, 1),
        (30, 1),
        (40, 1 / 2),
        (45, 1 / 2),
        (60, 1 / 3),
        (500, 1 / 3),
    ],
)
def test_the_factor_leads_to_nuclei_that_the_model_knows(diameter: float, factor: float) -> None:
    assert factor_for(diameter, trained=20) == factor
    assert factor_for(3 * diameter, trained=60) == factor


def test_the_median_diameter_is_that_of_equal_discs_and_none_for_too_few() -> None:
    labels = np.zeros((300, 300), np.uint16)
    for number in range(12):
        centre = (30 + 70 * (number // 4), 30 + 70 * (number % 4))
        labels[disk(centre, 20)] = number + 1
    assert median_diameter([labels]) == pytest.approx(40, rel=0.02)
    assert median_diameter([labels * (labels < 10)]) is None
    two = [labels * (labels < 7), labels * (labels < 7)]
    assert median_diameter(two) == pytest.approx(40, rel=0.02)


@pytest.mark.parametrize("factor", [2, 3])
def test_labels_enlarged_come_back_to_their_grid(factor: int) -> None:
    labels = generate(5, size=50)[1].astype(np.uint16)
    large = labels.repeat(factor, 0).repeat(factor, 1)
    np.testing.assert_array_equal(to_grid(large, labels.shape), labels)


def test_nuclei_that_a_smaller_grid_has_not_leave_no_gap() -> None:
    labels = np.zeros((30, 30), np.uint16)
    labels[0, 0], labels[10:20, 10:20] = 1, 2
    assert np.unique(to_grid(labels, (10, 10))).tolist() == [0, 1]


def test_shrinking_averages_pixels() -> None:
    image = torch.zeros(1, 1, 30, 30)
    image[..., ::3, ::3] = 9.0
    assert rescale(image, 1 / 3).shape == (1, 1, 10, 10)
    assert float(rescale(image, 1 / 3).mean()) == pytest.approx(1, rel=0.1)
    assert rescale(image, 1) is image
    assert rescale(image[..., :1, :1], 1 / 3).shape == (1, 1, 1, 1)


def test_bright_is_grey_on_a_bright_background() -> None:
    grey = torch.full((1, 3, 4, 4), 0.8)
    assert is_bright(grey)
    assert not is_bright(1 - grey)
    stain = grey.clone()
    stain[:, 1] = 0.7
    assert not is_bright(stain)


def ap50(target: NDArray[Any], preds: NDArray[Any]) -> float:
    return float(scores(compare(target, preds))["ap50"])


def test_nuclei_four_times_as_large_are_found_better_by_their_estimated_diameter() -> None:
    model = cellseg.load("nuclei-1")
    found: dict[object, list[float]] = defaultdict(list)
    for number in range(4):
        image, labels = generate(number, size=160)
        large = Image.fromarray(image).resize((640, 640), Image.Resampling.BICUBIC)
        target = labels.repeat(4, 0).repeat(4, 1)
        for way in ("none", "auto", 80.0):
            found[way].append(ap50(target, model.predict(np.asarray(large), way)))  # type: ignore[arg-type]
        found["native"].append(ap50(labels, model.predict(image)))
    means = {way: float(np.mean(values)) for way, values in found.items()}
    # Images of fewer than ten nuclei stay as they are.
    assert means["native"] - 0.05 < means[80.0]
    assert means["none"] + 0.1 < means["auto"] <= means[80.0], means


def test_the_size_of_nuclei_is_told_by_the_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    factors: list[float] = []
    segment = Segmenter.segment

    def counted(self: Segmenter, image: torch.Tensor, factor: float = 1.0) -> Segmentation:
        factors.append(factor)
        return segment(self, image, factor)

    monkeypatch.setattr(Segmenter, "segment", counted)
    model = cellseg.load("nuclei-1", "torch")
    image = generate(3, size=160)[0]
    model.predict(image)
    assert factors == [1]
    factors.clear()
    large = Image.fromarray(image).resize((640, 640), Image.Resampling.BICUBIC)
    model.predict(np.asarray(large))
    assert factors in ([1, 1 / 2], [1, 1 / 3])
    factors.clear()
    model.predict(np.asarray(large), "none")
    assert factors == [1]


def test_a_few_large_nuclei_are_told_by_the_first_pass() -> None:
    labels = np.zeros((400, 400), np.uint16)
    for number, centre in enumerate([(80, 90), (100, 300), (300, 110), (290, 300)]):
        labels[disk(centre, 55)] = number + 1
    speckles = np.random.default_rng(0).random((80, 80)).astype(np.float32)
    texture = np.asarray(Image.fromarray(speckles).resize((400, 400)))
    image = np.where(labels > 0, 90 + 120 * texture, 10).astype(np.uint8)
    model = cellseg.load("nuclei-1", "torch")
    assert ap50(labels, model.predict(image)) == 1
    assert ap50(labels, model.predict(image, "none")) < 0.5  # in pieces


def test_most_inverted_fluorescence_is_known_without_a_flag() -> None:
    model = cellseg.load("nuclei-1")
    right = 0
    for number in range(8):
        negative = 255 - generate(number, size=128)[0]
        found = model.predict(negative, "none")
        right += (found == model.predict(negative, "none", invert=True)).all()
    assert right >= 6
