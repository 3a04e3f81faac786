"""Read an image file and normalise it: one way for training and for prediction."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg.errors import InputError

Array = NDArray[Any]

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
# Written into our TIFFs, so that a later run does not take them for images.
SOFTWARE = "cellseg"


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image we read; hidden files are not."""
    base = name.rsplit("/", 1)[-1]
    return not base.startswith(".") and base.lower().endswith(SUFFIXES)


def read_image(source: Path | bytes, name: str = "") -> Array:
    """An image as it was recorded, as three channels.

    Grey is repeated, a palette is looked up, transparency is dropped, CMYK is converted,
    1-bit becomes 0 and 255, and a TIFF whose white is 0 is inverted.

    Args:
        source: The file, or its bytes.
        name: What to call it in errors; the file's path where none is given.

    Returns:
        (H, W, 3), uint8, uint16 or float32; no other range is promised.

    Raises:
        InputError: The file is damaged, or is no single grey or RGB plane.
    """
    pixels = read_pixels(source, name)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    elif pixels.shape[2] == 1 or pixels.shape[2] == 2:
        pixels = np.repeat(pixels[..., :1], 3, axis=2)
    pixels = pixels[..., :3]
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels
    return pixels.astype(np.float32)


def read_labels(source: Path | bytes, name: str = "") -> Array:
    """A mask or label image as (H, W) integers, as stored; colours are refused.

    Raises:
        InputError: The file is damaged or in colour, or holds fractions or negative values.
    """
    name = name or str(source)
    labels = read_pixels(source, name)
    if labels.ndim == 3:
        colours = labels[..., :3] if labels.shape[2] > 2 else labels[..., :1]
        if (colours != colours[..., :1]).any():
            raise InputError(f"{name}: a mask in colour; save it as a grey or label image")
        labels = colours[..., 0]
    if labels.dtype.kind == "f":
        if not (np.isfinite(labels).all() and (labels == labels.round()).all()):
            raise InputError(f"{name}: a mask with fractions; save it as whole numbers")
        labels = labels.astype(np.int64)
    if labels.min() < 0:
        raise InputError(f"{name}: a mask with negative values; 0 is the background")
    return labels


def read_pixels(source: Path | bytes, name: str = "") -> Array:
    """The pixels of one plane, (H, W) or (H, W, 1 to 4); see `read_image`."""
    name = name or str(source)
    data = source if isinstance(source, bytes) else source.read_bytes()
    if not data:
        raise InputError(f"{name}: the file is empty")
    try:
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            pixels = _read_tiff(data, name)
        else:
            pixels = _read_other(data, name)
    except InputError:
        raise
    except Exception as error:  # each decoder has exceptions of its own for damage
        cause = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name}: cannot be read: {cause}") from error
    if pixels.dtype.kind not in "buif":
        raise InputError(f"{name}: pixels of type {pixels.dtype} are not supported")
    if 0 in pixels.shape:
        raise InputError(f"{name}: the image has no pixels")
    return pixels


def _read_tiff(data: bytes, name: str) -> Array:
    import tifffile

    with tifffile.TiffFile(BytesIO(data)) as tiff:
        if len(tiff.series) != 1:
            raise InputError(
                f"{name}: holds {len(tiff.series)} images; save the one to segment on its own"
            )
        series = tiff.series[0]
        page = series.keyframe
        pixels = series.asarray()
        sizes = {a: n for a, n in zip(series.axes, series.shape, strict=True) if n > 1 or a in "YX"}
        axes, pixels = "".join(sizes), pixels.reshape(tuple(sizes.values()))
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            pixels = _inverted(pixels)
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE and axes == "YX":
            # 16-bit entries, in which an 8-bit colour v is stored as v * 257.
            pixels = np.moveaxis(np.asarray(page.colormap) >> 8, 0, -1).astype(np.uint8)[pixels]
            axes = "YXS"
    if axes in ("SYX", "CYX") and pixels.shape[0] in (3, 4):
        pixels, axes = np.moveaxis(pixels, 0, -1), "YXS"
    if axes == "YX" or (axes in ("YXS", "YXC") and pixels.shape[2] <= 4):
        return pixels
    shape = " x ".join(f"{n} {a}" for a, n in zip(axes, pixels.shape, strict=True))
    raise InputError(
        f"{name}: a stack, or channels that are not RGB ({shape}); save one grey or RGB plane"
    )


def _inverted(pixels: Array) -> Array:
    if pixels.dtype == bool:
        return ~pixels
    top = np.iinfo(pixels.dtype).max if pixels.dtype.kind in "ui" else pixels.max()
    return np.subtract(top, pixels, dtype=pixels.dtype)


def _read_other(data: bytes, name: str) -> Array:
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[24] == 16:
        # Pillow reads 16-bit RGB as 8-bit.
        import imagecodecs

        return np.asarray(imagecodecs.png_decode(data))
    from PIL import Image

    with Image.open(BytesIO(data)) as picture:
        frames = getattr(picture, "n_frames", 1)
        if frames > 1:
            raise InputError(f"{name}: holds {frames} frames; save the one to segment")
        if picture.mode in ("1", "L", "LA", "RGB", "RGBA") or picture.mode[0] in "IF":
            return np.asarray(picture)
        return np.asarray(picture.convert("RGB"))


def intensity_limits(image: Array, percentiles: tuple[float, float]) -> Array:
    """The two intensities that `normalise` maps to 0 and 1: percentiles of all channels.

    NaN and infinite pixels do not count. One pair for the three channels keeps the colours
    of a stain apart.

    Args:
        image: (H, W, C) of any type.
        percentiles: Low and high, in percent.

    Returns:
        (2,) float64, low and high; both 0 where no pixel is finite.
    """
    values = image
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        values = image[np.isfinite(image)]
        if values.size == 0:
            return np.zeros(2)
    return np.percentile(values, percentiles)


def normalise(image: Array, limits: Array) -> NDArray[np.float32]:
    """Intensities between the limits as [0, 1]; what lies outside is clipped.

    The range has a floor of one part in a thousand of the high limit (and of one grey level
    for integers): a black image with one hot pixel, or a constant one, stays black instead
    of having its noise blown up.

    Args:
        image: (H, W, C).
        limits: Of the whole image, from `intensity_limits`, also where `image` is a crop.

    Returns:
        (H, W, C) float32 in [0, 1]; NaN becomes 0.
    """
    low, high = (float(limit) for limit in limits)
    floor = 1e-3 * max(abs(low), abs(high), 1e-30)
    if image.dtype.kind in "ui":
        floor = max(floor, 1.0)
    scaled = (image.astype(np.float32) - np.float32(low)) / np.float32(max(high - low, floor))
    np.nan_to_num(scaled, copy=False, nan=0.0)
    return np.clip(scaled, 0, 1, out=scaled)
