"""The labels of an annotated image, from the masks in whatever form people keep them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cellseg.data.folders import OUTLINE_FILES, Sample, Tree
from cellseg.errors import InputError
from cellseg.reading.images import read_labels
from cellseg.reading.recording import Array


def read_masks(tree: Tree, sample: Sample, shape: tuple[int, int]) -> Array:
    """The labels (H, W) of a sample, from 1 without gaps.

    Raises:
        InputError: A file is damaged, is of another size than its image, or holds labels that
            were smoothed.
    """
    from skimage.measure import label

    masks = [_read(tree.source(name), name, shape) for name in sample.masks]
    for name, mask in zip(sample.masks, masks, strict=True):
        if mask.shape != shape:
            raise InputError(
                f"{name}: {mask.shape[0]} x {mask.shape[1]} px, but its image {sample.image} "
                f"has {shape[0]} x {shape[1]}"
            )
    # Beside a lone image a lone mask, of any name, may be that of its only nucleus or of all.
    if not sample.whole and (len(masks) > 1 or _is_of_one(masks[0])):
        return merge_masks(masks)
    if sample.masks[0].lower().endswith(OUTLINE_FILES):  # each is a nucleus, whatever its parts
        return _numbered(masks[0])
    labels = whole_labels(masks[0])
    nuclei, pieces = int(labels.max()), int(label(labels).max())
    # One nucleus in many pieces; or two or three values, of classes.
    classes = (masks[0].max() == 255 and pieces > 2 * nuclei) or _touch_twice(labels)
    if pieces > 10 + 2 * nuclei or (nuclei < 4 and classes):
        raise InputError(
            f"{sample.masks[0]}: {nuclei} nuclei in {pieces} pieces, as in classes of pixels or "
            "in labels that were smoothed or compressed; save a number a nucleus, without "
            "interpolation, as TIFF or PNG"
        )
    return labels


def _is_of_one(mask: Array) -> bool:
    """Whether a mask is that of a single nucleus: in one piece, and of no two labels."""
    from skimage.measure import label

    values = np.unique(mask[mask > 0])
    labels = len(values) > 1 and values[-1] == len(values)  # else the border may be soft
    return bool(label(mask > 0).max() < 2 and not labels)


def _touch_twice(labels: Array) -> bool:
    """Whether different labels touch in two places, as nuclei and their rims do all over an image.

    Two or three nuclei touch in one.
    """
    from skimage.measure import label, regionprops

    clumps = regionprops(label(labels > 0), labels)
    return sum(bool(each.intensity_max > each.intensity_min) for each in clumps) > 1


def merge_masks(masks: Sequence[Array]) -> Array:
    """One label image from one mask a nucleus; where two overlap, the first keeps the pixel.

    A pixel is in a nucleus where its mask has half of its highest value: that of a JPEG is not 0
    around it.
    """
    labels = np.zeros(masks[0].shape, np.int32)
    for number, mask in enumerate(masks, start=1):
        labels[(mask >= max(mask.max() / 2, 1)) & (labels == 0)] = number
    return _numbered(labels)


def whole_labels(mask: Array) -> Array:
    """Consecutive labels from one mask of all nuclei.

    A mask of one value besides 0 is binary: its 8-connected components are the nuclei.
    """
    from skimage.measure import label

    binary = np.count_nonzero(np.unique(mask)) <= 1
    return _numbered(label(mask > 0) if binary else mask)


def _numbered(labels: Array) -> Array:
    """Labels from 1 without gaps, as small as they can be."""
    from skimage.segmentation import relabel_sequential

    labels, _, _ = relabel_sequential(labels.copy())  # it takes no read-only array, as of Pillow
    # OpenCV warps uint16 as it is, but neither uint32 nor int64.
    small = labels.max(initial=0) <= np.iinfo(np.uint16).max
    return labels.astype(np.uint16 if small else np.int32)


def _read(source: Path | bytes, name: str, shape: tuple[int, int]) -> Array:
    from cellseg.data.outlines import read_geojson, read_rois

    if name.lower().endswith((".zip", ".roi")):
        return read_rois(source, shape, name)
    if name.lower().endswith(".geojson"):
        return read_geojson(source, shape, name)
    return read_labels(source, name)
