"""Datasets and samplers: random crops for training, whole images for all else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from cellseg.data.folders import digest_of, readable, size_and_time
from cellseg.data.images import (
    intensity_limits,
    normalise,
    read_recording,
    select_planes,
    to_rgb_planes,
)
from cellseg.data.large import LargeImage, left_out
from cellseg.data.recording import LARGE, Array
from cellseg.data.transforms import Augmentation
from cellseg.errors import InputError
from cellseg.instances import borders, encode


class Annotation(Protocol):
    """What a training set is made of; see `cache.Annotated`."""

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
        samples: Sequence[Annotation],
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
        self._limits: dict[int, Array] = {}

    def __getitem__(self, number: int) -> dict[str, Any]:
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
    `repeat` (see `Share`).
    """

    def __init__(self, samples: Sequence[Annotation], percentiles: tuple[float, float]) -> None:
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


@dataclass(frozen=True)
class Reading:
    """How image files are read to predict.

    Attributes:
        percentiles: See `intensity_limits`.
        channel: See `images.to_rgb_planes`.
        plane: See `images.select_planes`.
        pixel_size: In um, in place of what the file says.
        invert: For the task: whether to predict on the negative, or `auto`.
        diameter: For the task: of the nuclei in px, or `auto` or `none`.
    """

    percentiles: tuple[float, float]
    channel: str | None = None
    plane: str = "all"
    pixel_size: float | None = None
    invert: bool | str = "auto"
    diameter: float | str = "none"


class Held:
    """A tensor as it is, which Lightning would convert to the precision of the network."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class FileDataset(Dataset[dict[str, Any]]):
    """Image files to predict; one that cannot be read is an item with its `error`.

    Items: `file` (relative name), `stem` (of its results), `repeat` (see `Share`), `note`,
    `error` (empty where all is well), and without an error `image` (P, 3, H, W) float32 and
    `pixels` (P, H, W, C) as recorded, `Held`, or a `LargeImage` as `large`; `channels`, `planes`
    (the name of each, empty for a file of one plane), `axes` and `shape` of the planes,
    `pixel_size` (um or None), `invert` and `diameter` (see `Reading`), and `size`, `mtime` and
    `sha256`.

    Args:
        base: What the names are relative to.
        files: Names and the stems of their results.
        reading: How they are read.
    """

    def __init__(self, base: Path, files: Sequence[tuple[str, str]], reading: Reading) -> None:
        self.base = base
        self.files = files
        self.reading = reading

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: tuple[int, bool]) -> dict[str, Any]:
        index, repeat = place
        name, stem = self.files[index]
        item = {"file": name, "stem": stem, "repeat": repeat, "error": "", "note": ""}
        if repeat:  # it may be huge
            return item | {"error": "done by another process"}
        try:
            return item | self._read(name)
        except (ValueError, OSError, MemoryError) as error:
            return item | {"error": str(error) or type(error).__name__}

    def _read(self, name: str) -> dict[str, Any]:
        path, how = self.base / name, self.reading
        if readable(name) != name:
            raise InputError(f"{readable(name)}: its name is not valid Unicode; rename it")
        size, mtime = size_and_time(path)
        recording = read_recording(path, name, by_windows=True)
        if math.prod(recording.pixels.shape[:3]) > LARGE:
            large = LargeImage(recording, how.plane, how.channel, how.percentiles)
            content = {"large": large, "note": large.note}
            planes, axes, shape = large.planes, large.axes, large.sizes
        else:
            recording = select_planes(recording, how.plane)
            pixels, note = to_rgb_planes(recording, how.channel)
            image = normalise(pixels, intensity_limits(pixels, how.percentiles))
            bad = int(pixels[..., 0].size - np.isfinite(pixels[..., 0]).sum())
            content = {
                "image": torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2))),
                "pixels": Held(
                    torch.from_numpy(np.require(recording.pixels, requirements=["C", "W"]))
                ),
                "note": "; ".join(filter(None, [note, left_out(bad)])),
            }
            planes, axes, shape = recording.planes, recording.plane_axes, recording.plane_shape
        return content | {
            "channels": recording.channels,
            "planes": planes,
            "axes": axes,
            "shape": shape,
            "pixel_size": how.pixel_size or recording.pixel_size,
            "invert": how.invert,
            "diameter": how.diameter,
            "size": size,
            "mtime": mtime,
            "sha256": digest_of(path),
        }


class EndlessSampler(Sampler[int]):
    """The crop numbers of one epoch, going on where training stands.

    The position is a function of the steps taken, not a state of its own: a run resumed in
    mid-epoch sees the crops it would have seen.

    Args:
        crops: Crops of an epoch, over all processes.
        position: Crops taken so far, over all processes.
        rank: Of this process.
        world_size: Number of processes.
    """

    def __init__(
        self, crops: int, position: Callable[[], int], rank: int = 0, world_size: int = 1
    ) -> None:
        self.crops = crops
        self.position = position
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.crops // self.world_size

    def __iter__(self) -> Iterator[int]:
        start = self.position() + self.rank
        return iter(range(start, start + self.crops, self.world_size)[: len(self)])


class Share(Sampler[tuple[int, bool]]):
    """One process's share of a set of images, in order.

    Every process gets equally many items, as its collective calls demand; what fills up the
    last round is marked as a repeat, which is computed but neither counted nor written.
    Lightning's own sampler pads without a mark (biased scores) or not at all (a process
    without an image fails).
    """

    def __init__(self, size: int, rank: int = 0, world_size: int = 1) -> None:
        self.size = size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return -(-self.size // self.world_size)

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        for index in range(self.rank, len(self) * self.world_size, self.world_size):
            yield (index, False) if index < self.size else (0, True)


def local_labels(labels: Array) -> Array:
    """Labels of a crop as uint16, renumbered where they do not fit."""
    if labels.dtype == np.uint16:
        return labels
    values, numbers = np.unique(labels, return_inverse=True)
    start = 0 if values[0] == 0 else 1
    return (numbers.reshape(labels.shape) + start).astype(np.uint16)


def to_input(image: Array, percentiles: tuple[float, float]) -> torch.Tensor:
    """What the network takes of a whole image (H, W, 3): normalised, (3, H, W) float32."""
    return to_tensor(normalise(image, intensity_limits(image, percentiles)))


def to_tensor(image: Array) -> torch.Tensor:
    """(H, W, 3) as a contiguous (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
