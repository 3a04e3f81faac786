"""Metrics of the foreground's pixels and of the nuclei one by one.

Each is a pure function of one image, and a `torchmetrics.Metric` that adds images up, over
processes too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric


def confusion(preds: Tensor, target: Tensor) -> Tensor:
    """True positive, false positive and false negative pixels of each image.

    Args:
        preds: (N, ...) boolean.
        target: (N, ...) boolean.

    Returns:
        (N, 3) int64.
    """
    preds, target = preds.flatten(1), target.flatten(1)
    counts = [preds & target, preds & ~target, ~preds & target]
    return torch.stack([count.sum(1) for count in counts], dim=1)


def dice(counts: Tensor) -> Tensor:
    """2 TP / (2 TP + FP + FN) of (..., 3) counts; 1 where both sides are empty."""
    tp, fp, fn = counts.unbind(-1)
    return torch.where(tp + fp + fn > 0, 2 * tp / (2 * tp + fp + fn).clamp(min=1), 1.0)


def iou(counts: Tensor) -> Tensor:
    """TP / (TP + FP + FN) of (..., 3) counts; 1 where both sides are empty."""
    tp, fp, fn = counts.unbind(-1)
    return torch.where(tp + fp + fn > 0, tp / (tp + fp + fn).clamp(min=1), 1.0)


class ForegroundScores(Metric):
    """Dice and IoU of the foreground at probability 0.5.

    `dice` and `iou` are means over images, so that every image counts the same whatever its
    size; `dice_pooled` and `iou_pooled` are of the pixels of all images together. An image
    that is empty on both sides scores 1, one that is empty on one side 0. A NaN among the
    logits makes all scores NaN: a network that has diverged must not look fine.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    images: Tensor
    dice_sum: Tensor
    iou_sum: Tensor
    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("images", "dice_sum", "iou_sum"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")
        # Whole numbers: float32 stops counting at 16.8 million pixels.
        self.add_state("counts", torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count one batch.

        Args:
            logits: (N, 1, H, W).
            target: (N, 1, H, W), nuclei are 1.
        """
        counts = confusion(logits > 0, target > 0.5)
        nan = torch.nan if logits.isnan().any() else 0.0
        self.images += len(counts)
        self.dice_sum += dice(counts).sum() + nan
        self.iou_sum += iou(counts).sum() + nan
        self.counts += counts.sum(0)

    def compute(self) -> dict[str, Tensor]:
        """The four scores, NaN without any image."""
        nan = self.dice_sum * 0
        return {
            "dice": self.dice_sum / self.images,
            "iou": self.iou_sum / self.images,
            "dice_pooled": dice(self.counts) + nan,
            "iou_pooled": iou(self.counts) + nan,
        }


# IoU above which a prediction is a match, as in the 2018 Data Science Bowl.
THRESHOLDS = (50, 55, 60, 65, 70, 75, 80, 85, 90, 95)
MISTAKES = ("merged", "split", "missed", "extra")


def compare(target: NDArray[Any], preds: NDArray[Any]) -> dict[str, float]:
    """How the predicted nuclei of an image meet the true ones, as sums that can be added up.

    Args:
        target: (H, W) true labels, 0 is the background; ids may have gaps.
        preds: (H, W) predicted labels.

    Returns:
        `true`, `predicted`: numbers of nuclei. `matched50` to `matched95`: matches at an IoU
        **above** the threshold in percent; from 50 on a nucleus can have one match only, so
        that nothing needs to be assigned. `iou_sum`: IoU of the matches above 50.
        `aji_intersection`, `aji_union`: of the aggregated Jaccard index (Kumar et al. 2017,
        https://doi.org/10.1109/TMI.2017.2677499). `merged`: predictions that hold most of two
        or more nuclei. `split`: nuclei that hold most of two or more predictions. `missed`:
        nuclei of which most is predicted as background. `extra`: predictions of which most is
        on the background.

    Raises:
        ValueError: The shapes differ.
    """
    if target.shape != preds.shape:
        raise ValueError(f"target of shape {target.shape} and preds of {preds.shape}")
    true, true_area = _numbered(target)
    pred, pred_area = _numbered(preds)
    pairs, overlap = np.unique(true * len(pred_area) + pred, return_counts=True)
    i, j = np.divmod(pairs, len(pred_area))
    missed = np.count_nonzero(2 * overlap[(i > 0) & (j == 0)] > true_area[i[(i > 0) & (j == 0)]])
    extra = np.count_nonzero(2 * overlap[(i == 0) & (j > 0)] > pred_area[j[(i == 0) & (j > 0)]])

    both = (i > 0) & (j > 0)
    i, j, overlap = i[both], j[both], overlap[both]
    union = true_area[i] + pred_area[j] - overlap
    iou = overlap / union
    # In whole numbers: 100 * 0.55 is more than 55.
    matches = {f"matched{t}": np.count_nonzero(100 * overlap > t * union) for t in THRESHOLDS}

    # Each nucleus with its prediction of highest IoU, which may serve more than one; whatever
    # takes part in no pair adds to the union.
    order = np.lexsort((-iou, i))
    best = order[np.unique(i[order], return_index=True)[1]]
    alone = np.delete(true_area, np.append(i[best], 0)).sum()
    alone += np.delete(pred_area, np.append(j[best], 0)).sum()

    sums = {
        "true": len(true_area) - 1,
        "predicted": len(pred_area) - 1,
        **matches,
        "iou_sum": iou[2 * overlap > union].sum(),
        "aji_intersection": overlap[best].sum(),
        "aji_union": union[best].sum() + alone,
        "merged": np.count_nonzero(np.bincount(j[2 * overlap > true_area[i]]) > 1),
        "split": np.count_nonzero(np.bincount(i[2 * overlap > pred_area[j]]) > 1),
        "missed": missed,
        "extra": extra,
    }
    return {name: float(value) for name, value in sums.items()}


def scores(sums: dict[str, float]) -> dict[str, float]:
    """The field's scores from the sums of `compare`, of one image or of several added up.

    Without any nucleus on either side all are 1; with none on one side they are 0.

    Returns:
        `ap50` to `ap95`: TP / (TP + FP + FN) at each threshold, the precision of the 2018 Data
        Science Bowl, which StarDist calls accuracy; it is not COCO's average precision. `map`:
        their mean. `f1`: at IoU 0.5. `pq`: panoptic quality (Kirillov et al. 2019,
        https://arxiv.org/abs/1801.00868). `aji`: aggregated Jaccard index.
    """
    nuclei = sums["true"] + sums["predicted"]
    aps = {f"ap{t}": _ratio(sums[f"matched{t}"], nuclei - sums[f"matched{t}"]) for t in THRESHOLDS}
    return {
        **aps,
        "map": sum(aps.values()) / len(aps),
        "f1": _ratio(2 * sums["matched50"], nuclei),
        "pq": _ratio(2 * sums["iou_sum"], nuclei),
        "aji": _ratio(sums["aji_intersection"], sums["aji_union"]),
    }


class InstanceScores(Metric):
    """The scores of `scores`, as means over images and, ending in `_pooled`, of all nuclei.

    Further `count_error`, the mean over images of |predicted - true| nuclei, and over all
    images the numbers of nuclei `merged`, `split`, `missed` and `extra`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    images: Tensor
    means: Tensor
    sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        nothing = compare(np.zeros((1, 1), int), np.zeros((1, 1), int))
        self._sums = tuple(nothing)
        self._scores = (*scores(nothing), "count_error")
        # Sums of a fixed size: a process without an image has nothing to gather.
        self.add_state("images", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("means", torch.zeros(len(self._scores)), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(len(self._sums)), dist_reduce_fx="sum")

    def update(self, preds: NDArray[Any], target: NDArray[Any]) -> None:
        """Count one image, by its labels (H, W)."""
        sums = compare(target, preds)
        error = abs(sums["predicted"] - sums["true"])
        self.images += 1
        self.means += self.means.new_tensor([*scores(sums).values(), error])
        self.sums += self.sums.new_tensor(list(sums.values()))

    def compute(self) -> dict[str, Tensor]:
        """All scores, NaN without any image."""
        sums = dict(zip(self._sums, self.sums.tolist(), strict=True))
        pooled = {f"{name}_pooled": score for name, score in scores(sums).items()}
        numbers = {name: sums[name] for name in MISTAKES}
        return {
            **dict(zip(self._scores, self.means / self.images, strict=True)),
            **{name: self.images.new_tensor(v) for name, v in {**pooled, **numbers}.items()},
        }


def _numbered(labels: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Labels (H * W) without gaps, and the area of each; 0 is the background, even if absent."""
    ids, numbers = np.unique(labels, return_inverse=True)
    numbers = numbers.ravel().astype(np.int64) + (ids[0] != 0)
    return numbers, np.bincount(numbers)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0
