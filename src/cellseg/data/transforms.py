"""Random training crops: image and labels warped together, then the image alone recoloured.

The only module that knows albumentations; 2.0.8 is its last release under the MIT licence.
"""

from __future__ import annotations

import math
import os
import random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg.errors import InputError
from cellseg.reading.recording import Array

# albumentations asks a package index for its newest version on import unless told not to.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

# A larger window is cut first, so that rotation and shrinking find real pixels at the border.
WINDOW = 1.4


class Augmentation:
    """Cuts a crop of a fixed size and varies it.

    All randomness comes from the seed of each call. Left to itself albumentations repeats its
    numbers in every worker and every epoch (its generator is made once and forked).

    Args:
        crop_size: Side of the crop in px.
        strength: 0 only cuts the crop, 1 is meant for general use; it scales both how far and
            how often each change goes.
        share: Of the crops that are varied; the others are only cut, turned and mirrored.
    """

    def __init__(self, crop_size: int, strength: float = 1.0, share: float = 1.0) -> None:
        if crop_size < 1:
            raise InputError(f"--data.crop_size {crop_size}: must be positive")
        if not 0 <= strength < math.inf:
            raise InputError(f"--data.augment {strength:g}: must not be negative, nor infinite")
        if not 0 <= share <= 1:
            raise InputError(f"--data.augment_share {share:g}: must lie in 0 to 1")
        self.crop_size = crop_size
        self.strength = strength
        self.share = share
        self._pipelines: tuple[Any, Any] | None = None

    def __call__(
        self, image: Array, labels: Array, seed: int
    ) -> tuple[NDArray[np.float32], NDArray[np.uint16]]:
        """One crop.

        Args:
            image: (H, W, 3) float32 in [0, 1].
            labels: (H, W) of at most 65,535 different values.
            seed: Decides everything.

        Returns:
            (crop_size, crop_size, 3) float32 in [0, 1] and (crop_size, crop_size) uint16.
        """
        if self._pipelines is None:  # here, so that only training imports albumentations
            self._pipelines = (_pipeline(self.crop_size, self.strength), _turns(self.crop_size))
        varied, turned = self._pipelines
        rng = np.random.default_rng(seed)
        pipeline = turned if self.share < 1 and rng.random() >= self.share else varied
        # One pair of generators for the whole pipeline. `set_random_seed` would start every
        # transform with the same number: all of them would happen together or not at all.
        pipeline.set_random_state(rng, random.Random(seed))
        done = pipeline(image=image, mask=labels)
        return np.clip(done["image"], 0, 1, dtype=np.float32), done["mask"]

    def window(self, shape: tuple[int, int], rng: np.random.Generator) -> tuple[slice, slice]:
        """A random window of an image, as large as the pipeline can use."""
        side = round(self.crop_size * WINDOW)
        starts = [int(rng.integers(max(size - side, 0) + 1)) for size in shape]
        return slice(starts[0], starts[0] + side), slice(starts[1], starts[1] + side)


def _turns(size: int) -> Any:
    """Leaves the pixels as they are."""
    import albumentations as A
    import cv2

    pad = A.PadIfNeeded(size, size, position="random", border_mode=cv2.BORDER_REFLECT_101)
    return A.Compose([pad, A.RandomCrop(size, size), A.D4(p=1)], strict=True)


def _pipeline(size: int, strength: float) -> Any:
    import albumentations as A
    import cv2

    # The data workers are the parallelism; OpenCV's own threads would only fight them.
    cv2.setNumThreads(0)
    s = strength
    side = round(size * WINDOW)
    pad = {"border_mode": cv2.BORDER_REFLECT_101}
    cut = [
        A.PadIfNeeded(side, side, position="random", **pad),
        A.RandomCrop(size, size) if s == 0 else A.RandomCrop(side, side),
    ]
    if s == 0:
        return A.Compose(cut, strict=True)

    def often(p: float) -> float:
        return min(1.0, p * s)

    warp = [
        A.Affine(
            scale=(1 / (1 + 0.5 * s), 1 + 0.5 * s),
            rotate=(-45 * s, 45 * s),
            shear=(-8 * s, 8 * s),
            balanced_scale=True,
            p=often(0.7),
            **pad,
        ),
        # Nuclei of other magnifications, of a third to three times the diameter.
        A.Affine(scale=(1 / (1 + 2 * s), 1 + 2 * s), balanced_scale=True, p=often(0.15), **pad),
        A.CenterCrop(size, size),
        A.ElasticTransform(
            alpha=40 * s, sigma=8, approximate=False, same_dxdy=False, p=often(0.15), **pad
        ),
        A.D4(p=1),
    ]
    colour = [
        A.HueSaturationValue(
            hue_shift_limit=25 * s, sat_shift_limit=30 * s, val_shift_limit=0, p=often(0.4)
        ),
        # Stains vary between laboratories; the grey images also learn to ignore a tint.
        A.RGBShift(0.1 * s, 0.1 * s, 0.1 * s, p=often(0.15)),
        A.ToGray(p=often(0.1)),
        A.InvertImg(p=often(0.15)),
        A.RandomGamma(gamma_limit=(100 / (1 + 0.8 * s), 100 * (1 + 0.8 * s)), p=often(0.5)),
        A.RandomBrightnessContrast(0.15 * s, 0.3 * s, p=often(0.5)),
        A.GaussianBlur(blur_limit=0, sigma_limit=(0.3, 0.3 + 1.5 * s), p=often(0.2)),
        A.GaussNoise(std_range=(0.005, 0.005 + 0.06 * s), p=often(0.3)),
        # Last, since the blocks of JPEG are in what was recorded. Those of a dim image are as
        # plain as the nuclei once its contrast is stretched: hence the low qualities.
        A.ImageCompression(quality_range=(max(5, round(100 - 90 * s)), 100), p=often(0.2)),
    ]
    return A.Compose([*cut, *warp, *colour], strict=True)
