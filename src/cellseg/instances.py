"""Labels to maps and back: the targets of training and the nuclei of a prediction; pure arrays.

Of three ways to tell touching nuclei apart this one did best, see `docs/maps.md`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAPS = ("foreground", "contour")
# Side in px of the window in which two nuclei make a contour. A thin line, of 3, is learned later.
REACH = 5
# Width in px of the border between two nuclei that counts more in training, as in the paper.
SIGMA = 5


@dataclass(frozen=True)
class Decoding:
    """How probabilities become nuclei; the levels that a model was tuned to replace the defaults.

    Args:
        threshold: Foreground probability above which a pixel belongs to a nucleus.
        marker: A nucleus starts where its foreground probability exceeds that of a contour by
            this much.
        min_area: Smaller nuclei are dropped, in px of what the network sees.
        min_confidence: Nuclei whose mean foreground probability is lower are dropped.
        exclude_border: Drop nuclei that touch the border of the image.
        flips: Average the network's output over the image turned and mirrored in all eight ways:
            eight times as slow, and a little better.
    """

    threshold: float = 0.5
    marker: float = 0.5
    min_area: int = 10
    min_confidence: float = 0.0
    exclude_border: bool = False
    flips: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("threshold", 0, 1),
            ("marker", -1, 1),
            ("min_area", 0, math.inf),
            ("min_confidence", 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"--decode.{name} {value:g}: must lie in {low} to {high}")

    def at(self, scale: float) -> Decoding:
        """The levels on the grid of an image that the network saw enlarged by `scale`.

        `min_area` counts pixels of what the network saw.
        """
        return replace(self, min_area=round(self.min_area / scale**2))


def encode(labels: NDArray[Any]) -> NDArray[np.uint8]:
    """The target maps of labels.

    Args:
        labels: (H, W) integers, 0 is the background.

    Returns:
        (2, H, W) of 0 and 1: the nuclei, and where two of them meet: all pixels, also of the
        gap between them, whose 5 x 5 neighbourhood holds more than one nucleus.
    """
    import cv2

    ids = labels.astype(np.float64)  # the only type of OpenCV that holds all labels
    nuclei, window = ids > 0, np.ones((REACH, REACH), np.uint8)
    highest = cv2.dilate(ids, window)
    lowest = cv2.erode(np.where(nuclei, ids, np.inf), window)  # the background is not meant
    return np.stack([nuclei, lowest < highest]).astype(np.uint8)


def borders(labels: NDArray[Any]) -> NDArray[np.float32]:
    """Where the background separates two nuclei, from 0 to 1.

    The border weight of Ronneberger et al. 2015 (https://arxiv.org/abs/1505.04597) without its
    factor w0: `exp(-(d1 + d2)^2 / (2 sigma^2))` with the distances to the nearest and the second
    nearest nucleus.

    Args:
        labels: (H, W) integers, 0 is the background.

    Returns:
        (H, W) float32, 0 in nuclei.
    """
    import cv2
    from scipy.ndimage import find_objects

    reach = 4 * SIGMA  # beyond it the weight is below 1 / 2000
    nearest = np.full(labels.shape, np.inf, np.float32)  # squared, like all that follow
    second = nearest.copy()
    for number, box in enumerate(find_objects(labels), start=1):
        if box is None:
            continue
        around = tuple(slice(max(side.start - reach, 0), side.stop + reach) for side in box)
        outside = (labels[around] != number).view(np.uint8)
        distance = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        # OpenCV's last digit differs from call to call, but the squares are whole numbers.
        squared = np.rint(distance**2)
        second[around] = np.minimum(second[around], np.maximum(nearest[around], squared))
        nearest[around] = np.minimum(nearest[around], squared)
    weight = np.exp(-((np.sqrt(nearest) + np.sqrt(second)) ** 2) / (2 * SIGMA**2))
    return np.where(labels == 0, weight, 0).astype(np.float32)


def decode(maps: NDArray[Any], decoding: Decoding | None = None) -> NDArray[Any]:
    """The nuclei of predicted maps.

    With both maps each nucleus floods the foreground from its interior (watershed); with the
    foreground alone nuclei are its 8-connected components.

    Args:
        maps: (1, H, W) or (2, H, W) probabilities, in the order of `MAPS`.
        decoding: The levels; by default those of `Decoding`.

    Returns:
        (H, W) labels from 1 without gaps, 0 is the background: uint16, or uint32 from 65,536
        nuclei on.
    """
    from skimage.measure import label
    from skimage.segmentation import clear_border, watershed

    decoding = decoding or Decoding()
    mask = maps[0] > decoding.threshold
    if len(maps) == 1:
        labels = label(mask)
    else:
        interior = maps[0] - maps[1]
        markers = label(interior > decoding.marker)
        labels = watershed(-interior, markers, connectivity=2, mask=mask)
    if decoding.exclude_border:
        labels = clear_border(labels)
    areas = np.bincount(labels.ravel())
    sums = np.bincount(labels.ravel(), maps[0].ravel())
    kept = (areas >= max(decoding.min_area, 1)) & (sums >= decoding.min_confidence * areas)
    kept[0] = False
    numbers = np.cumsum(kept) * kept
    numbered: NDArray[Any] = narrow(numbers)[labels]
    return numbered


def equivalent_diameter(area: NDArray[Any] | float) -> NDArray[Any]:
    """The diameter in px of the disc of as many px as a nucleus has."""
    return np.asarray(np.sqrt(4 / np.pi * area))


def narrow(labels: NDArray[Any]) -> NDArray[Any]:
    """Labels of any shape as uint16, which more programs read, or as uint32 from 65,536 on."""
    return labels.astype(np.uint16 if labels.max() <= 65535 else np.uint32, copy=False)
