"""The training loss: soft Dice plus binary cross-entropy, on logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DiceBCELoss(nn.Module):
    """`dice_weight * (1 - Dice) + bce_weight * BCE`.

    The field disagrees on Dice; this is the one used here, for probabilities p and targets t:

    * denominator: the plain sums of Sudre et al. 2017 (https://arxiv.org/abs/1707.03237),
      `(2 sum(p t) + s) / (sum(p) + sum(t) + s)`, not the squares of V-Net;
    * sums run over one image and one map; the loss is the mean over images and maps, so a
      small nucleus in a sparse image counts as much as one in a crowd;
    * empty target: the smoothing s = 1 makes an empty prediction score 1 and keeps the
      gradient finite.

    Sums are taken in float32 whatever the precision of the logits: in half precision those
    of a 2048 x 2048 image overflow.

    Args:
        dice_weight: Weight of the Dice term.
        bce_weight: Weight of the binary cross-entropy, the mean over all pixels.

    Raises:
        ValueError: A weight is negative or not finite, or both are zero.
    """

    def __init__(self, dice_weight: float = 1.0, bce_weight: float = 1.0) -> None:
        super().__init__()
        # Written so that NaN fails as well.
        if not (min(dice_weight, bce_weight) >= 0 and 0 < dice_weight + bce_weight < math.inf):
            raise ValueError(
                "the weights of the loss must be finite, not negative and not both zero, got "
                f"dice_weight={dice_weight}, bce_weight={bce_weight}"
            )
        self.dice_weight = dice_weight
        self.bce_weight = bce_weight

    def forward(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of one batch, a float32 scalar.

        Args:
            logits: (N, C, H, W), any floating type.
            target: (N, C, H, W) in [0, 1].
            weight: (N, C, H, W), of each pixel in the cross-entropy; by default 1.

        Raises:
            ValueError: The shapes differ, or the target leaves [0, 1] (0/255 masks).
        """
        if logits.shape != target.shape:
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} and target of {tuple(target.shape)}"
            )
        logits, target = logits.float(), target.float()
        low, high = target.aminmax()
        # Written so that NaN fails as well.
        if not (low >= 0 and high <= 1):
            raise ValueError(f"the target must lie in [0, 1], got {low:g} to {high:g}")
        loss = logits.new_zeros(())
        if self.dice_weight:
            loss = loss + self.dice_weight * dice_loss(torch.sigmoid(logits), target)
        if self.bce_weight:
            bce = F.binary_cross_entropy_with_logits(logits, target, weight)
            loss = loss + self.bce_weight * bce
        return loss


def dice_loss(probs: Tensor, target: Tensor) -> Tensor:
    """One minus the soft Dice of each image and map, averaged; see `DiceBCELoss`.

    Args:
        probs: (N, C, H, W) float32 probabilities.
        target: (N, C, H, W) float32 in [0, 1].

    Returns:
        A scalar in [0, 1).
    """
    overlap = (probs * target).sum(dim=(-2, -1))
    total = probs.sum(dim=(-2, -1)) + target.sum(dim=(-2, -1))
    return (1 - (2 * overlap + 1) / (total + 1)).mean()
