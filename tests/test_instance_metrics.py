from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from skimage.draw import disk

from cellseg.data.synthetic import generate
from cellseg.metrics import MISTAKES, THRESHOLDS, Scores, compare, scores
from cellseg.scoring.scored import Scored

Labels = NDArray[Any]


def discs(*centres: tuple[int, int]) -> Labels:
    labels = np.zeros((100, 200), int)
    for number, centre in enumerate(centres, start=1):
        labels[disk(centre, 10)] = number
    return labels


TRUE = discs((20, 20), (50, 50), (50, 90), (20, 150))
EMPTY = np.zeros_like(TRUE)


def oracle(target: Labels, preds: Labels) -> dict[str, float]:
    """Matching as StarDist does it: a full IoU matrix and an optimal assignment."""
    true, pred = (np.setdiff1d(labels, 0) for labels in (target, preds))
    iou = np.zeros((len(true), len(pred)))
    for row, i in enumerate(true):
        for column, j in enumerate(pred):
            both = np.count_nonzero((target == i) & (preds == j))
            either = np.count_nonzero((target == i) | (preds == j))
            iou[row, column] = both / either
    result = {}
    for percent in THRESHOLDS:
        good = iou > percent / 100 + 1e-9
        rows, columns = linear_sum_assignment(-(good + iou / (2 * max(iou.size, 1))))
        tp = int(good[rows, columns].sum())
        fp, fn = len(pred) - tp, len(true) - tp
        result[f"ap{percent}"] = tp / (tp + fp + fn) if tp + fp + fn else 1.0
        if percent == 50:
            result["f1"] = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1.0
            matched = good[rows, columns]
            total = iou[rows, columns][matched].sum()
            result["pq"] = total / (tp + fp / 2 + fn / 2) if tp + fp + fn else 1.0
    result["map"] = float(np.mean([result[f"ap{percent}"] for percent in THRESHOLDS]))
    return result


def perturbed(labels: Labels, seed: int) -> Labels:
    """Shifted, with some nuclei gone, merged or cut in two."""
    rng = np.random.default_rng(seed)
    moved = np.roll(labels, rng.integers(-3, 4, 2), axis=(0, 1)).astype(int)
    ids = rng.permutation(np.setdiff1d(moved, 0))
    moved[moved == ids[0]] = 0
    moved[moved == ids[1]] = ids[2]
    rows, columns = np.nonzero(moved == ids[3])
    half = columns > np.median(columns)
    moved[rows[half], columns[half]] = moved.max() + 5
    return moved


@pytest.mark.parametrize("seed", range(6))
def test_scores_equal_an_optimal_assignment(seed: int) -> None:
    target = generate(seed, size=128)[1]
    preds = perturbed(target, seed)
    ours = scores(compare(target, preds))
    for name, value in oracle(target, preds).items():
        assert ours[name] == pytest.approx(value), name


def test_drawn_discs_with_known_answers() -> None:
    # The first is moved by 2 px, the next two are one, the fourth is missing, one is invented.
    preds = discs((20, 22), (50, 50), (50, 90), (80, 20))
    preds[preds == 3] = 2
    sums = compare(TRUE, preds)
    assert (sums["true"], sums["predicted"], sums["matched50"]) == (4, 3, 1)
    assert {name: sums[name] for name in MISTAKES} == {
        "merged": 1, "split": 0, "missed": 1, "extra": 1,
    }  # fmt: skip
    assert scores(sums)["ap50"] == pytest.approx(1 / 6)
    assert scores(sums)["f1"] == pytest.approx(2 / 7)
    assert compare(preds, TRUE)["split"] == 1


def test_two_rectangles_in_closed_form() -> None:
    target, preds = np.zeros((2, 20, 20), int)
    target[:10, :10] = 1
    preds[:10, 2:12] = 1
    result = scores(compare(target, preds))  # 80 px of 120 in common
    assert [result[f"ap{t}"] for t in THRESHOLDS] == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert result["map"] == pytest.approx(0.4)
    assert result["pq"] == result["aji"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("percent", range(50, 100, 5))
def test_an_iou_of_exactly_the_threshold_is_no_match(percent: int) -> None:
    target, preds = np.zeros((2, 10, 10), int)
    target[:] = 1
    preds.ravel()[:percent] = 1
    sums = compare(target, preds)
    assert sums[f"matched{percent}"] == 0
    preds.ravel()[percent] = 1
    assert compare(target, preds)[f"matched{percent}"] == 1


def test_aji_counts_a_prediction_twice_where_it_is_the_best_of_two_nuclei() -> None:
    target, preds = np.zeros((2, 10, 40), int)
    target[:, 0:10], target[:, 10:20], target[:, 30:32] = 1, 2, 3
    preds[:, 0:20], preds[:, 35:40] = 1, 2
    # 100 of 200 twice, the third nucleus (20) and the second prediction (50) alone.
    assert scores(compare(target, preds))["aji"] == pytest.approx(200 / (400 + 70))


@pytest.mark.parametrize(
    ("target", "preds", "value"),
    [(EMPTY, EMPTY, 1), (EMPTY, TRUE, 0), (TRUE, EMPTY, 0), (TRUE, TRUE, 1)],
)
def test_empty_sides(target: Labels, preds: Labels, value: float) -> None:
    assert set(scores(compare(target, preds)).values()) == {value}


def test_ids_with_gaps_and_an_image_without_background() -> None:
    assert compare(TRUE, TRUE * 1000)["matched95"] == 4
    full = np.arange(1, 5).repeat(25).reshape(10, 10)
    assert compare(full, full)["matched95"] == 4
    one = np.array([[7]])
    assert scores(compare(one, one))["map"] == 1


def test_seventy_thousand_labels() -> None:
    labels = np.arange(1, 70_001).reshape(280, 250)
    sums = compare(labels, labels * (labels % 2))
    assert (sums["true"], sums["predicted"], sums["matched95"]) == (70_000, 35_000, 35_000)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(100, 200\)"):
        compare(TRUE, TRUE[:50])


def test_means_are_over_images_and_pooled_scores_over_nuclei() -> None:
    pairs = [(TRUE, TRUE), (TRUE, EMPTY), (discs((50, 50)), EMPTY), (EMPTY, EMPTY)]
    metric = Scores()
    for target, preds in pairs:
        metric.update(compare(target, preds))
    result = {name: float(value) for name, value in metric.compute().items()}
    assert result["ap50"] == pytest.approx(2 / 4)
    assert result["ap50_pooled"] == pytest.approx(4 / 9)
    assert result["count_error"] == pytest.approx((0 + 4 + 1 + 0) / 4)
    assert result["missed"] == 5


def test_aji_takes_the_prediction_of_highest_iou_where_several_overlap() -> None:
    target, preds = np.zeros((2, 10, 20), int)
    target[:, :10] = 1
    preds[:, :3], preds[:, 3:10] = 1, 2
    # 70 of 100 px with the second; the first, of 30 px, alone.
    assert scores(compare(target, preds))["aji"] == pytest.approx(70 / (100 + 30))


def test_half_of_a_nucleus_is_not_most_of_it() -> None:
    target, preds = np.zeros((2, 10, 40), int)
    target[:, :10], target[:, 20:30] = 1, 2
    preds[:, 5:25] = 1  # half of each nucleus, and half of it on the background
    for pair in ((target, preds), (preds, target)):
        sums = compare(*pair)
        assert {name: sums[name] for name in MISTAKES} == dict.fromkeys(MISTAKES, 0)


def test_an_iou_of_exactly_a_half_adds_nothing_to_the_panoptic_quality() -> None:
    target, preds = np.zeros((2, 10, 20), int)
    target[:, :10], preds[:, :5] = 1, 1
    assert scores(compare(target, preds))["pq"] == 0


def test_the_error_of_a_count_is_positive_in_either_direction() -> None:
    few, many = np.zeros((2, 4, 8), int)
    few[0, 0], many[0, ::2] = 1, np.arange(1, 5)
    for target, preds in ((few, many), (many, few)):
        metric = Scores()
        metric.update(compare(target, preds))
        assert float(metric.compute()["count_error"]) == 3
        assert Scored("a", "a", "", compare(target, preds)).scores["count_error"] == 3


def test_pooled_panoptic_quality_adds_up_over_images() -> None:
    labels = np.arange(1, 5).repeat(25).reshape(10, 10)
    metric = Scores()
    for preds in (labels, 0 * labels):
        metric.update(compare(labels, preds))
    # 4 matches of IoU 1; 4 nuclei of the second image are missed.
    assert float(metric.compute()["pq_pooled"]) == pytest.approx(4 / (4 + 4 / 2))
