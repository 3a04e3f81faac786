"""Annotated images: random crops for training, whole images to score on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from cellseg.data.transforms import Augmentation
from cellseg.instances import borders, encode
from cellseg.reading.intensity import Limits, intensity_limits, normalise, to_tensor
from cellseg.reading.recording import Array


class Annotated(Protocol):
    """What a training set is made of; see `cache.CachedImage`."""

    @property
    def id(self) -> str: ...
    def image(self) -> Array: ...
    def labels(self) -> Array: ...
    def digest(self) -> str: ...


class CropDataset(Dataset[dict[str, Any]]):
    """Endless random crops: item `number` depends on the seed and that number alone.

    So a crop is the same whatever the number of workers, processes and restarts, and no two
    are alike.

    Items: `image` (3, S, S) float32, `labels` (S, S) int32, `maps` (2, S, S) uint8 and `borders`
    (S, S) float32 (see `instances`), `id`, `number`.

    Args:
        samples: The training images.
        augmentation: Makes the crop.
        percentiles: See `intensity_limits`.
        seed: Of all randomness.
        weights: How often each image is drawn, relative to the others; by default all alike.
    """

    def __init__(
        self,
        samples: Sequence[Annotated],
        augmentation: Augmentation,
        percentiles: tuple[float, float],
        seed: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.samples = samples
        shares = np.ones(len(samples)) if weights is None else np.asarray(weights)
        self._until = np.cumsum(shares / shares.sum())
        self.augmentation = augmentation
        self.percentiles = percentiles
        self.seed = seed
        self._limits: dict[int, Limits] = {}

    def __getitem__(self, number: int) -> dict[str, Any]:
        from skimage.measure import label

        rng = np.random.default_rng((self.seed, number))
        index = min(int(np.searchsorted(self._until, rng.random())), len(self.samples) - 1)
        sample = self.samples[index]
        image = sample.image()
        if index not in self._limits:  # of the whole image, once a worker
            self._limits[index] = intensity_limits(image, self.percentiles)
        window = self.augmentation.window(image.shape[:2], rng)
        crop = normalise(image[window], self._limits[index])
        crop, labels = self.augmentation(
            crop, local_labels(sample.labels()[window]), int(rng.integers(2**31))
        )
        # A nucleus and its mirror image, beyond the border of a small image, are two.
        labels = label(labels, connectivity=2)
        return {
            "image": to_tensor(crop),
            "labels": torch.from_numpy(labels.astype(np.int32)),
            "maps": torch.from_numpy(encode(labels)),
            "borders": torch.from_numpy(borders(labels)),
            "id": sample.id,
            "number": number,
        }


class WholeImageDataset(Dataset[dict[str, Any]]):
    """Annotated images at native size.

    Items: `image` (3, H, W) float32, `labels` (H, W) int32, `maps` (2, H, W) uint8, `id`,
    `repeat` (see `samplers.Share`).
    """

    def __init__(self, samples: Sequence[Annotated], percentiles: tuple[float, float]) -> None:
        self.samples = samples
        self.percentiles = percentiles

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: tuple[int, bool]) -> dict[str, Any]:
        index, repeat = place
        sample = self.samples[index]
        image, labels = sample.image(), sample.labels()
        return {
            "image": to_input(image, self.percentiles),
            "labels": torch.from_numpy(labels.astype(np.int32)),
            "maps": torch.from_numpy(encode(labels)),
            "id": sample.id,
            "repeat": repeat,
        }


def local_labels(labels: Array) -> Array:
    """Labels of a crop as uint16, renumbered where they do not fit."""
    if labels.dtype == np.uint16:
        return labels
    from skimage.segmentation import relabel_sequential

    # A copy, since it takes no read-only array, as of the cache.
    return np.asarray(relabel_sequential(labels.copy())[0].astype(np.uint16))


def to_input(image: Array, percentiles: tuple[float, float]) -> torch.Tensor:
    """What the network takes of a whole image (H, W, 3): normalised, (3, H, W) float32."""
    return to_tensor(normalise(image, intensity_limits(image, percentiles)))
