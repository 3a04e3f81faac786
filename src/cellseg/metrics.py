"""Pixel metrics of the foreground."""

from __future__ import annotations

from typing import Any

import torch
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
