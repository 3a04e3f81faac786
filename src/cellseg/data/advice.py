"""What people forget when they have few images, said before they train."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

import numpy as np

from cellseg.data.dataset import Annotation
from cellseg.data.recording import Array
from cellseg.errors import few

log = logging.getLogger(__name__)

# Fewer images than this are better scored by folds than on one test side.
FEW = 30
# Below so many images, each is looked at for what people forget when they annotate.
CHECKED = 200


def advise(annotated: Sequence[Annotation], groups: Collection[str], folds_asked: bool) -> None:
    """Name images that look annotated in part, and say how folds are made of a few images.

    Args:
        annotated: All images.
        groups: Of which each must be on one side.
        folds_asked: Whether this training is one of a fold.
    """
    if len(annotated) < CHECKED:
        half = [s.id for s in annotated if is_half_annotated(s.image(), s.labels())]
        if half:
            log.warning(
                f"{len(half)} images look annotated in one part only, which teaches that the "
                f"other nuclei are background; cut them to that part: {few(half)}"
            )
    folds = min(5, len(groups))
    if len(annotated) < FEW and folds >= 3 and not folds_asked:
        log.info(
            f"{len(annotated)} images make a test of few: --data.folds {folds} --data.fold 0 "
            f"to {folds - 1}, one run each below one folder, then test --ckpt_path FOLDER "
            "score all of them"
        )


def is_half_annotated(image: Array, labels: Array) -> bool:
    """Whether much of an image looks like its nuclei, and is not annotated.

    That is so where all nuclei lie in a box of less than half of the image, and outside of it
    more pixels than are annotated lie beyond Otsu's threshold.

    Args:
        image: (H, W, 3).
        labels: (H, W).
    """
    from skimage.filters import threshold_otsu

    rows, columns = np.nonzero(labels)
    grey = image.mean(axis=2)
    finite = np.isfinite(grey)
    grey = np.where(finite, grey, np.median(grey[finite])) if finite.any() else 0 * labels
    if len(rows) == 0 or grey.min() == grey.max():
        return False
    box = np.zeros(labels.shape, bool)
    box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
    if 2 * box.sum() > box.size:
        return False
    bright = grey > threshold_otsu(grey)
    if bright[labels > 0].mean() < 0.5:  # dark nuclei
        bright = ~bright
    return bool(bright[~box].sum() > np.count_nonzero(labels))
