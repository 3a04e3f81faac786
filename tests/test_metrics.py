from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_f1_score, binary_jaccard_index

from cellseg.metrics import Scores, compare

Pair = tuple[np.ndarray, np.ndarray]
NAMES = ("dice", "iou", "dice_pooled", "iou_pooled")


def image(height: int, width: int, foreground: float, seed: int) -> Pair:
    rng = np.random.default_rng(seed)
    target = rng.random((height, width)) < foreground
    preds = target ^ (rng.random((height, width)) < 0.3)
    # Labels of any number: only the foreground counts here.
    return target * rng.integers(1, 9, target.shape), preds * rng.integers(1, 9, target.shape)


def constant(target: int, preds: int) -> Pair:
    return np.full((6, 7), target), np.full((6, 7), preds)


# Sizes and densities differ, so that the mean over images is not the score of all pixels.
IMAGES = [
    image(40, 60, 0.5, 1),
    image(7, 5, 0.1, 2),
    image(16, 16, 0.9, 3),
    image(1, 30, 0.3, 4),
    constant(0, 0),
    constant(1, 0),
]


def scores_of(pairs: list[Pair]) -> dict[str, float]:
    metric = Scores()
    for target, preds in pairs:
        metric.update(compare(target, preds))
    scores = metric.compute()
    return {name: float(scores[name]) for name in NAMES}


def oracle(pairs: list[Pair]) -> dict[str, float]:
    flat = [tuple(torch.from_numpy(x > 0).int().ravel() for x in (p, t)) for t, p in pairs]
    pooled = [torch.cat(side) for side in zip(*flat, strict=True)]
    scores = {}
    for name, function in [("dice", binary_f1_score), ("iou", binary_jaccard_index)]:
        each = [float(function(*pair, zero_division=1)) for pair in flat]
        scores[name] = sum(each) / len(each)
        scores[f"{name}_pooled"] = float(function(*pooled, zero_division=1))
    return scores


def test_foreground_scores_are_those_of_torchmetrics_by_image_and_pooled() -> None:
    expected = oracle(IMAGES)
    assert scores_of(IMAGES) == pytest.approx(expected, abs=1e-6)
    for one, other in pairwise(sorted(expected.values())):
        assert other - one > 0.01  # else a mix-up of two of them would go unseen


@pytest.mark.parametrize(("target", "preds", "score"), [(0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 1)])
def test_empty_on_both_sides_is_1_and_on_one_side_0(target: int, preds: int, score: float) -> None:
    assert scores_of([constant(target, preds)]) == dict.fromkeys(NAMES, score)


def test_pixels_are_counted_beyond_what_float32_counts() -> None:
    metric = Scores()
    big = np.ones((4100, 4100), np.uint8)  # 16.8 million pixels
    one = np.ones((1, 1), np.uint8)
    metric.update(compare(big, big))
    for _ in range(3):
        metric.update(compare(one, 0 * one))
    missed = float(metric.counts[metric._counts.index("pixels_true")]) - 4100**2
    assert missed == 3


def test_a_reset_forgets_all_images() -> None:
    metric = Scores()
    metric.update(compare(*IMAGES[0]))
    metric.compute()
    metric.reset()
    metric.update(compare(*IMAGES[1]))
    assert float(metric.compute()["dice"]) == pytest.approx(scores_of([IMAGES[1]])["dice"])


@pytest.mark.parametrize("first", [0, 1, 4, 6])
def test_two_processes_together_score_as_one(first: int) -> None:
    # `merge_state` joins states as the synchronisation of processes does. A process may well
    # have had no image.
    whole, here, there = Scores(), Scores(), Scores()
    for number, pair in enumerate(IMAGES):
        for metric in (whole, here if number < first else there):
            metric.update(compare(*pair))
    here.merge_state(there)
    here._update_count = 1  # else it warns where `here` had no image
    expected = {name: float(score) for name, score in whole.compute().items()}
    assert {n: float(s) for n, s in here.compute().items()} == pytest.approx(expected, abs=1e-6)


def test_without_any_image_the_mean_is_nan() -> None:
    with pytest.warns(UserWarning, match="before the ``update``"):
        scores = Scores().compute()
    assert scores["dice"].isnan()
    assert scores["map"].isnan()
