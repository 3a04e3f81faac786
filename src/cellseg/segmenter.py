"""The nuclei of an image of any size: how the network is to see it, and what it then finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellseg.adapt import (
    SCALES,
    is_bright,
    median_diameter,
    rescale,
    resize_maps,
    scale_for,
    to_grid,
)
from cellseg.instances import Decoding
from cellseg.reading.recording import LARGE
from cellseg.tiles import Maps, with_halo

# Where a model is as sure as this of an image as it is, it knows nuclei of their size.
SURE = 0.97
# The least part of the area of what it found as it is that it is to find rescaled: nuclei that look
# small since JPEG has broken them vanish when their pieces are enlarged. (Confidences say less: a
# probability falls off over some pixels at each border, whatever the size of a nucleus.)
KEPT = 0.9
# And of their median diameter: what is so much smaller then are specks and grain.
SAME = 0.55
# Enlarging takes four or nine times as long: it is tried for nuclei of less than this part of the
# diameter that the model was trained on, and first on a part of the image of so many px a side.
SMALL, PART = 0.5, 512
# Where larger nuclei are missed, what is found covers less than this part of the image, and seen
# smaller they cover so many times more, of which the model is as sure. (In none of the Data Science
# Bowl's training and validation images that are so empty it is more than 1.3 times; in others up to
# 3.5, without being right.)
SPARSE, MORE = 0.03, 5


@dataclass(frozen=True)
class Segmentation:
    """The nuclei of one plane: `labels` (H, W), and the `probs` (H, W) of the foreground."""

    labels: NDArray[Any]
    probs: NDArray[np.float32]

    @property
    def confidence(self) -> float:
        """The mean probability in nuclei; 0 without any."""
        inside = self.probs[self.labels > 0]
        return float(inside.mean()) if inside.size else 0.0


@dataclass(frozen=True)
class View:
    """How the network sees an image: enlarged by `scale`, and `inverted` or not.

    The median `diameter` of its nuclei in px is None where it is not known.
    """

    scale: float
    diameter: float | None
    inverted: bool

    def apply(self, image: Tensor) -> Tensor:
        """The image (N, 3, H, W) or its negative."""
        return 1 - image if self.inverted else image


@dataclass(frozen=True)
class Segmenter:
    """Finds nuclei with a trained network.

    Attributes:
        network: Gives the probabilities (N, out_channels, H, W) of images (N, 3, H, W).
        whole: As `network`, for whole images: it may batch those of several threads.
        precision: Makes the context in which this thread has the network compute.
        depth: Number of its poolings.
        diameter: Median diameter in px of the nuclei that it was trained on.
        decoding: How probabilities become nuclei.
        decode: As `instances.decode`, but it may compute elsewhere.
    """

    network: Callable[[Tensor], Tensor]
    whole: Callable[[Tensor], Tensor]
    precision: Callable[[], torch.autocast]
    depth: int
    diameter: float
    decoding: Decoding
    decode: Callable[[NDArray[Any], Decoding], NDArray[Any]]

    def __call__(
        self, batch: dict[str, Any], invert: bool | str, diameter: float | str
    ) -> dict[str, Any]:
        """The nuclei of one file; see `SegmentationTask.predict_step` and `find`."""
        large = batch.get("large")
        with torch.inference_mode(), self.precision():
            # All planes of a stack, and all tiles of a slide, are treated alike.
            image = batch["image"] if large is None else large.image(*large.sample)[None]
            middle = len(image) // 2
            sample = image[middle, None]
            view, found = self.find(sample, invert, diameter)
            if large is not None:
                return {"view": view, "maps": partial(self._maps, large, view)}
            planes = [
                found if place == middle else self.segment(view.apply(plane[None]), view.scale)
                for place, plane in enumerate(image)
            ]
        labels = np.stack([plane.labels for plane in planes])
        probs = np.stack([plane.probs for plane in planes])
        return {"view": view, "labels": labels, "probs": probs}

    def find(
        self, sample: Tensor, invert: bool | str, diameter: float | str
    ) -> tuple[View, Segmentation]:
        """How an image is to be seen, decided on one plane (1, 3, H, W), and its nuclei.

        Args:
            sample: The plane, normalised.
            invert: See `--data.invert`.
            diameter: See `--data.diameter`.
        """
        inverted = invert is True
        if inverted:
            sample = 1 - sample
        known = None if isinstance(diameter, str) else diameter
        scale = scale_for(known, self.diameter) if known else 1.0
        found = self.segment(sample, scale)
        if invert == "auto" and is_bright(sample):
            # Inverted fluorescence is grey on bright as brightfield is; the model tells them apart.
            negative = self.segment(1 - sample, scale)
            if negative.confidence > found.confidence:
                inverted, sample, found = True, 1 - sample, negative
        if diameter == "auto":
            scale, known, found = self._at_its_size(sample, found)
        return View(scale, known, inverted), found

    def _at_its_size(
        self, sample: Tensor, found: Segmentation
    ) -> tuple[float, float | None, Segmentation]:
        """The scale at which to see a plane, the diameter that asks for it, and the nuclei then.

        At a scale of 1 they are `found`.
        """
        diameter, area = median_diameter([found.labels]), np.count_nonzero(found.labels)
        if diameter is None or area < SPARSE * found.labels.size:
            # Of the largest nuclei the model finds pieces at most, unless it sees them smaller.
            smallest = min(SCALES)
            smaller = self.segment(sample, smallest)
            larger = median_diameter([smaller.labels])
            scale = scale_for(larger, self.diameter) if larger else 1.0
            surer = smaller.confidence >= found.confidence
            if scale < 1 and surer and np.count_nonzero(smaller.labels) >= MORE * area:
                seen = smaller if scale == smallest else self.segment(sample, scale)
                return scale, larger, seen
        if diameter is None:
            return 1.0, None, found
        wanted = scale_for(diameter, self.diameter)
        worth_it = wanted < 1 or (wanted > 1 and diameter < SMALL * self.diameter)
        if worth_it and found.confidence < SURE:
            part = _densest(found.labels) if wanted > 1 else (slice(None), slice(None))
            tried = self.segment(sample[..., *part], wanted)
            if _are_the_same(found.labels[part], tried.labels):
                whole = tried.labels.shape == found.labels.shape
                return wanted, diameter, tried if whole else self.segment(sample, wanted)
        return 1.0, diameter, found

    def _maps(self, large: Any, view: View, plane: int) -> Maps:
        """Gives the probabilities of any window of a plane of a large image."""

        def of_window(rows: slice, columns: slice) -> NDArray[np.float32]:
            image = view.apply(large.image(plane, rows, columns)[None])
            with torch.inference_mode(), self.precision():
                return self._on_grid(image, view.scale)

        return with_halo(of_window, large.shape[1:], view.scale, self.depth)

    def _on_grid(self, image: Tensor, scale: float) -> NDArray[np.float32]:
        """Probabilities (out_channels, h, w) of a window (1, 3, h, w) that is seen enlarged."""
        # Tiles come one after the other: there is nothing to batch.
        probs: NDArray[np.float32] = self.network(rescale(image, scale))[0].cpu().numpy()
        return probs if scale == 1 else resize_maps(probs, image.shape[-2:])

    def segment(self, image: Tensor, scale: float) -> Segmentation:
        """The nuclei of one plane.

        Args:
            image: (1, 3, H, W), normalised.
            scale: By which the network sees it enlarged: by windows, if it is large then.
        """
        height, width = image.shape[-2:]
        shape = height, width
        if scale > 1 and height * width * scale**2 > LARGE:

            def window(rows: slice, columns: slice) -> NDArray[np.float32]:
                return self._on_grid(image[..., rows, columns], scale)

            probs = with_halo(window, shape, scale, self.depth)(slice(0, height), slice(0, width))
        else:
            probs = self.whole(rescale(image, scale))[0].cpu().numpy()
            if scale > 1:  # narrow gaps are seen that the full grid has not
                # Beside a nucleus, the border may have a pixel on the fine grid alone.
                fine = self.decode(probs, replace(self.decoding, exclude_border=False))
                labels = to_grid(fine, shape, self.decoding.exclude_border)
                return Segmentation(labels, resize_maps(probs, shape)[0])
            if scale < 1:  # the outlines follow the full grid
                probs = resize_maps(probs, shape)
        return Segmentation(self.decode(probs, self.decoding.at(scale)), probs[0])


def _densest(labels: NDArray[Any]) -> tuple[slice, slice]:
    """The part of labels (H, W), `PART` px a side at most, with the most pixels of nuclei."""
    from skimage.measure import block_reduce

    counts = block_reduce(labels > 0, PART, np.sum)
    row, column = np.unravel_index(counts.argmax(), counts.shape)
    return slice(row * PART, (row + 1) * PART), slice(column * PART, (column + 1) * PART)


def _are_the_same(labels: NDArray[Any], rescaled: NDArray[Any]) -> bool:
    """Whether what a rescaled view shows are the nuclei that were found without."""
    before, after = median_diameter([labels]), median_diameter([rescaled])
    kept = np.count_nonzero(rescaled) >= KEPT * np.count_nonzero(labels)
    return bool(kept and before and after and after >= SAME * before)
