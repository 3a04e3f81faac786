"""What people get wrong when they have few images, said before they are used."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np

from cellseg.data.dataset import Annotated
from cellseg.data.splits import Split
from cellseg.errors import few
from cellseg.reading.recording import Array

log = logging.getLogger(__name__)

# Fewer images than this are better scored by folds than on one test side.
FEW = 30
# Below so many images, each is looked at for what people forget when they annotate.
CHECKED = 200
# How people call folders that hold the sides of a split.
SIDES_BY_NAME = ("train", "training", "val", "valid", "validation", "test", "testing")


def check_annotations(annotated: Sequence[Annotated], to_train: bool) -> None:
    """Name images whose annotation looks like a mistake, unless there are many images.

    Args:
        annotated: All images.
        to_train: Whether they are to be learned from; scored, they may be annotated in part.
    """
    if len(annotated) >= CHECKED:
        return
    half = [s.id for s in annotated if to_train and is_half_annotated(s.image(), s.labels())]
    if half:
        log.warning(
            "Images that look annotated in one part only teach that their other nuclei are "
            f"background; cut them to that part: {few(half)}"
        )
    if annotated and not any(sample.labels().any() for sample in annotated):
        log.warning(
            "No image has a nucleus: all masks are empty; nuclei must not be 0, nor seen by their "
            "transparency alone"
        )
    inverted = [s.id for s in annotated if is_inverted(s.labels())]
    if inverted:
        log.warning(
            "Images with a nucleus that reaches from border to border and covers more than half, "
            f"as where a mask shows nuclei in black on white; nuclei must not be 0: {few(inverted)}"
        )
    hollow = [s.id for s in annotated if s.id not in inverted and is_hollow(s.labels())]
    if hollow:
        log.warning(
            "Images with outlines for masks, of which the inside counts as background; fill them: "
            f"{few(hollow)}"
        )


def check_unseen(split: Split, digests: Mapping[str, str], trained: Collection[str]) -> None:
    """Name images to evaluate on whose digests are among those that are trained on."""
    evaluated = [*split.sides["val"], *split.sides["test"]]
    if seen := [sample for sample in evaluated if digests[sample] in trained]:
        log.warning(
            "Images to evaluate on were trained on, or are copies of such, so the scores are "
            f"too high: {few(seen)}"
        )


def advise_folds(annotated: Sequence[Annotated], groups: Collection[str]) -> None:
    """Say how folds are made of a few images, of which those of a group are on one side."""
    folds = min(5, len(groups))
    if len(annotated) < FEW and folds >= 3:
        log.info(
            "The test side of so few images says little. To score all of them, train once with "
            f"each of --data.fold 0 to {folds - 1} of --data.folds {folds}, below one folder; "
            "then cellseg test --ckpt_path FOLDER"
        )


def advise_split(ids: Sequence[str]) -> None:
    """Say that folders do not divide the images, where their names are those of sides."""
    tops = sorted({PurePosixPath(sample).parts[0] for sample in ids if "/" in sample})
    if sides := [top for top in tops if top.lower() in SIDES_BY_NAME]:
        log.warning(
            f"The folders {', '.join(sides)} are not taken for the split; --data.split names a "
            "table that says it, and --data.root one of them"
        )


def is_inverted(labels: Array) -> bool:
    """Whether one nucleus covers more than half of an image (H, W), on all of its borders."""
    label = int(np.bincount(labels.ravel()).argmax())
    borders = labels[0], labels[-1], labels[:, 0], labels[:, -1]
    covers = 2 * int(np.count_nonzero(labels == label)) > labels.size
    return label > 0 and covers and all(bool((border == label).any()) for border in borders)


def is_hollow(labels: Array) -> bool:
    """Whether labels (H, W) are mere outlines: of most the inside, a third of all, is background.

    Of 222 images of the Data Science Bowl that holds for none, and for 98 % of their outlines.
    """
    from skimage.measure import label
    from skimage.segmentation import clear_border

    inside = clear_border(label(labels == 0, connectivity=1))
    holes, nuclei = (len(np.unique(each[each > 0])) for each in (inside, labels))
    return 2 * holes > nuclei and bool(2 * (inside > 0).sum() > (labels > 0).sum())


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
