"""Rescaling and inverting images, so that they resemble those that a model was trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cellseg.instances import equivalent_diameter

# Images are seen at these scales only, so that neighbouring images are treated alike.
SCALES = (1 / 3, 1 / 2, 1.0, 2.0, 3.0)
# Median diameters that a model finds as they are, as parts of the one that it was trained on; see
# `docs/diameter.md`.
KNOWN = (0.6, 1.5)
# Mean difference of its colours up to which it is grey, as with a pen mark or a tinted lamp. In the
# Data Science Bowl's stained images it is at least .10.
TINT = 0.05
# Median diameter in px of the nuclei in the 2018 Data Science Bowl's training images.
DIAMETER = 19.7
# Fewer nuclei say nothing about their size.
FEWEST = 3


def scale_for(diameter: float, trained: float) -> float:
    """The scale that brings nuclei to a size the model knows.

    Args:
        diameter: Their median diameter in px.
        trained: That of the nuclei which the model was trained on.
    """
    if KNOWN[0] <= diameter / trained <= KNOWN[1]:
        return 1.0
    return min(SCALES, key=lambda scale: abs(math.log(scale * diameter / trained)))


def median_diameter(images: Iterable[NDArray[Any]]) -> float | None:
    """The median equivalent diameter in px of the nuclei in labels (H, W); None for too few."""
    areas = np.concatenate([np.bincount(labels.ravel())[1:] for labels in images])
    areas = areas[areas > 0]
    return float(equivalent_diameter(np.median(areas))) if len(areas) >= FEWEST else None


def rescale(image: Tensor, scale: float) -> Tensor:
    """An image (N, C, H, W) enlarged by the scale; where it shrinks, pixels are averaged."""
    if scale == 1:
        return image
    size = [max(1, round(side * scale)) for side in image.shape[-2:]]
    return F.interpolate(image, size, mode="bilinear", antialias=scale < 1, align_corners=False)


def resize_maps(maps: NDArray[np.float32], shape: Sequence[int]) -> NDArray[np.float32]:
    """Maps (C, h, w) on another grid, (C, H, W)."""
    resized = F.interpolate(
        torch.from_numpy(maps)[None], tuple(shape), mode="bilinear", align_corners=False
    )
    return resized[0].numpy()


def to_grid(
    labels: NDArray[Any], shape: Sequence[int], exclude_border: bool = False
) -> NDArray[Any]:
    """Labels on another grid (H, W), each pixel the nearest one; without gaps, from 1."""
    from skimage.segmentation import clear_border, relabel_sequential

    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip(shape, labels.shape, strict=True)
    )
    nearest = labels[np.ix_(rows, columns)]
    if exclude_border:
        nearest = clear_border(nearest)
    numbered: NDArray[Any] = relabel_sequential(nearest)[0]
    return numbered.astype(labels.dtype)


def is_bright(image: Tensor) -> bool:
    """Whether a normalised image (1, 3, H, W) is grey on a bright background."""
    tint = float((image.amax(1) - image.amin(1)).mean())
    return tint < TINT and float(image[:, 0].median()) > 0.5
