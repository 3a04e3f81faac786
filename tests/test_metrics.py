from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_f1_score, binary_jaccard_index

from cellseg.metrics import ForegroundScores, confusion

Batch = tuple[Tensor, Tensor]


def image(height: int, width: int, foreground: float, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    target = (torch.rand(1, 1, height, width, generator=generator) < foreground).float()
    return 2 * torch.randn(target.shape, generator=generator) + 2 * target - 1, target


def constant(logit: float, target: float) -> Batch:
    return torch.full((1, 1, 6, 7), logit), torch.full((1, 1, 6, 7), target)


# Sizes and densities differ, so that the mean over images is not the score of all pixels.
IMAGES = [
    image(40, 60, 0.5, 1),
    image(7, 5, 0.1, 2),
    image(16, 16, 0.9, 3),
    image(1, 30, 0.3, 4),
    constant(-3.0, 0.0),
    constant(-3.0, 1.0),
]


def scores_of(batches: list[Batch]) -> dict[str, float]:
    metric = ForegroundScores()
    for logits, target in batches:
        metric.update(logits, target)
    return {name: float(score) for name, score in metric.compute().items()}


def oracle(images: list[Batch]) -> dict[str, float]:
    # Probabilities, as torchmetrics would take logits that all lie in [0, 1] for them.
    pairs = [(logits.sigmoid().flatten(), target.int().flatten()) for logits, target in images]
    pooled = [torch.cat(side) for side in zip(*pairs, strict=True)]
    scores = {}
    for name, function in [("dice", binary_f1_score), ("iou", binary_jaccard_index)]:
        each = [float(function(*pair, zero_division=1)) for pair in pairs]
        scores[name] = sum(each) / len(each)
        scores[f"{name}_pooled"] = float(function(*pooled, zero_division=1))
    return scores


def test_scores_are_those_of_torchmetrics_by_image_and_pooled() -> None:
    expected = oracle(IMAGES)
    assert scores_of(IMAGES) == pytest.approx(expected, abs=1e-6)
    for one, other in pairwise(sorted(expected.values())):
        assert other - one > 0.01  # else a mix-up of two of them would go unseen


@pytest.mark.parametrize("sizes", [[8], [3, 5], [1, 6, 1]])
def test_scores_do_not_depend_on_how_images_are_batched(sizes: list[int]) -> None:
    images = [image(16, 24, 0.1 * number, number) for number in range(8)]
    batches = [
        (torch.cat([logits for logits, _ in part]), torch.cat([target for _, target in part]))
        for part in torch.utils.data.random_split(images, sizes)
    ]
    assert scores_of(batches) == pytest.approx(oracle(images), abs=1e-6)


@pytest.mark.parametrize(
    ("logit", "target", "score"), [(-1, 0, 1), (1, 0, 0), (-1, 1, 0), (1, 1, 1)]
)
def test_empty_on_both_sides_is_1_and_on_one_side_0(
    logit: float, target: float, score: float
) -> None:
    scores = scores_of([constant(logit, target)])
    assert scores == dict.fromkeys(("dice", "iou", "dice_pooled", "iou_pooled"), score)


def test_logits_between_0_and_1_are_logits() -> None:
    _, target = image(10, 10, 0.3, 5)
    logits = torch.linspace(0.01, 0.99, 100).reshape(1, 1, 10, 10)
    found = float(target.sum())  # every pixel is called a nucleus
    scores = scores_of([(logits, target)])
    assert scores["dice"] == pytest.approx(2 * found / (found + 100))
    assert scores["iou"] == pytest.approx(found / 100)


def test_a_pixel_at_probability_one_half_is_background() -> None:
    assert scores_of([constant(0.0, 0.0)])["dice"] == 1
    assert scores_of([constant(1e-6, 1.0)])["dice"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_score_the_same(dtype: torch.dtype) -> None:
    assert scores_of([(x.to(dtype), t) for x, t in IMAGES]) == scores_of(IMAGES)


def test_confusion_counts_true_positives_then_false_positives_then_false_negatives() -> None:
    preds = torch.tensor([[[1, 1, 1, 1, 0, 0]], [[0, 0, 0, 0, 0, 0]]]).bool()
    target = torch.tensor([[[1, 0, 0, 0, 1, 1]], [[0, 0, 0, 0, 1, 0]]]).bool()
    assert confusion(preds, target).tolist() == [[1, 3, 2], [0, 0, 1]]


def test_a_reset_forgets_all_images() -> None:
    metric = ForegroundScores()
    metric.update(*IMAGES[0])
    metric.compute()
    metric.reset()
    metric.update(*IMAGES[1])
    scores = {name: float(score) for name, score in metric.compute().items()}
    assert scores == scores_of([IMAGES[1]])


@pytest.mark.parametrize("first", [0, 1, 4, 6])
def test_two_processes_together_score_as_one(first: int) -> None:
    # `merge_state` joins states as the synchronisation of processes does. A process may well
    # have had no image.
    here, there = ForegroundScores(), ForegroundScores()
    for number, batch in enumerate(IMAGES):
        (here if number < first else there).update(*batch)
    here.merge_state(there)
    here._update_count = 1  # else it warns where `here` had no image
    scores = {name: float(score) for name, score in here.compute().items()}
    assert scores == pytest.approx(oracle(IMAGES), abs=1e-6)


def test_without_any_image_the_mean_is_nan() -> None:
    with pytest.warns(UserWarning, match="before the ``update``"):
        scores = ForegroundScores().compute()
    assert scores["dice"].isnan()
    assert scores["iou"].isnan()
