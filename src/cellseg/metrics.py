"""Metrics of the foreground's pixels and of the nuclei one by one.

`compare` counts one image, `scores` makes scores of counts, and `Scores` adds images up, over
processes too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

# IoU above which a prediction is a match, as in the 2018 Data Science Bowl.
THRESHOLDS = (50, 55, 60, 65, 70, 75, 80, 85, 90, 95)
MISTAKES = ("merged", "split", "missed", "extra")
COUNTS = ("true", "predicted", *MISTAKES)


def compare(target: NDArray[Any], preds: NDArray[Any]) -> dict[str, float]:
    """How the predicted nuclei of an image meet the true ones, as sums that can be added up.

    Args:
        target: (H, W) true labels, 0 is the background; ids may have gaps.
        preds: (H, W) predicted labels.

    Returns:
        `pixels_true`, `pixels_predicted`, `pixels_both`: pixels of the foreground. `true`,
        `predicted`: numbers of nuclei. `matched50` to `matched95`: matches at an IoU
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
    no_pred, no_true = (i > 0) & (j == 0), (i == 0) & (j > 0)
    missed = np.count_nonzero(2 * overlap[no_pred] > true_area[i[no_pred]])
    extra = np.count_nonzero(2 * overlap[no_true] > pred_area[j[no_true]])

    both = (i > 0) & (j > 0)
    i, j, overlap = i[both], j[both], overlap[both]
    pixels = {
        "pixels_true": true_area[1:].sum(),
        "pixels_predicted": pred_area[1:].sum(),
        "pixels_both": overlap.sum(),
    }
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
        **pixels,
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


def scores(sums: Mapping[str, float]) -> dict[str, float]:
    """The field's scores from the sums of `compare`, of one image or of several added up.

    Without any nucleus on either side all are 1; with none on one side they are 0.

    Returns:
        `dice`, `iou`: of the foreground, labels above 0. `ap50` to `ap95`: TP / (TP + FP + FN)
        at each threshold, the precision of the 2018 Data Science Bowl, which StarDist calls
        accuracy; it is not COCO's average precision. `map`: their mean. `f1`: at IoU 0.5. `pq`:
        panoptic quality (Kirillov et al. 2019, https://arxiv.org/abs/1801.00868). `aji`:
        aggregated Jaccard index.
    """
    nuclei = sums["true"] + sums["predicted"]
    pixels = sums["pixels_true"] + sums["pixels_predicted"]
    aps = {f"ap{t}": _ratio(sums[f"matched{t}"], nuclei - sums[f"matched{t}"]) for t in THRESHOLDS}
    return {
        "dice": _ratio(2 * sums["pixels_both"], pixels),
        "iou": _ratio(sums["pixels_both"], pixels - sums["pixels_both"]),
        **aps,
        "map": sum(aps.values()) / len(aps),
        "f1": _ratio(2 * sums["matched50"], nuclei),
        "pq": _ratio(2 * sums["iou_sum"], nuclei),
        "aji": _ratio(sums["aji_intersection"], sums["aji_union"]),
    }


def count_error(sums: Mapping[str, float]) -> float:
    """By how many the predicted nuclei are more or fewer than the true ones."""
    return abs(sums["predicted"] - sums["true"])


class Scores(Metric):
    """The scores of `scores`, as means over images and, ending in `_pooled`, of all together.

    Further `count_error`, the mean over images of |predicted - true| nuclei, and over all
    images the numbers of nuclei `merged`, `split`, `missed` and `extra`.
    """

    full_state_update = False

    images: Tensor
    means: Tensor
    counts: Tensor
    iou_sum: Tensor

    def __init__(self) -> None:
        super().__init__()
        nothing = compare(np.zeros((1, 1), int), np.zeros((1, 1), int))
        self._counts = tuple(name for name in nothing if name != "iou_sum")
        self._scores = (*scores(nothing), "count_error")
        # Of a fixed size: a process without an image has nothing to gather. Whole numbers,
        # since float32 stops counting at 16.8 million pixels.
        self.add_state("images", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("means", torch.zeros(len(self._scores)), dist_reduce_fx="sum")
        self.add_state(
            "counts", torch.zeros(len(self._counts), dtype=torch.int64), dist_reduce_fx="sum"
        )
        self.add_state("iou_sum", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, sums: Mapping[str, float]) -> None:
        """Count one image, by what `compare` says of it."""
        self.images += 1
        self.means += self.means.new_tensor([*scores(sums).values(), count_error(sums)])
        self.counts += self.counts.new_tensor([int(sums[name]) for name in self._counts])
        self.iou_sum += sums["iou_sum"]

    def compute(self) -> dict[str, Tensor]:
        """All scores, NaN without any image."""
        sums = dict(zip(self._counts, map(float, self.counts.tolist()), strict=True))
        sums["iou_sum"] = float(self.iou_sum)
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
