"""Read an image file and normalise it: one way for training and for prediction."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cellseg.errors import InputError

Array = NDArray[Any]

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
# Written into our TIFFs, so that a later run does not take them for images.
SOFTWARE = "cellseg"
# TIFF photometric interpretations that need no conversion: white is 0, black is 0, RGB, palette.
PLAIN = (0, 1, 2, 3)


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
    return to_rgb(read_pixels(source, name))


def to_rgb(pixels: Array) -> Array:
    """Pixels (H, W) or (H, W, 1 to 4) as (H, W, 3); see `read_image`."""
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    elif pixels.shape[2] == 1 or pixels.shape[2] == 2:
        pixels = np.repeat(pixels[..., :1], 3, axis=2)
    pixels = pixels[..., :3]
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite, and counts as such
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
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: not an image, or damaged at its start") from error
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
        if not tiff.series:
            raise InputError(f"{name}: no image in it; the file is cut off or damaged")
        if len(tiff.series) > 1:
            raise InputError(
                f"{name}: holds {len(tiff.series)} images; save the one to segment on its own"
            )
        series = tiff.series[0]
        page = series.keyframe
        for part in series.pages:
            # Decoders fill up what a cut-off strip lacks.
            if part is None or any(
                offset + count > len(data)
                for offset, count in zip(part.dataoffsets, part.databytecounts, strict=True)
            ):
                raise InputError(f"{name}: the file is cut off")
        if page.photometric not in PLAIN and page.compression != tifffile.COMPRESSION.JPEG:
            return _read_other(data, name)  # CMYK and the like: Pillow converts them
        pixels = series.asarray()
        sizes = {a: n for a, n in zip(series.axes, series.shape, strict=True) if n > 1 or a in "YX"}
        axes, pixels = "".join(sizes), pixels.reshape(tuple(sizes.values()))
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            pixels = -pixels if pixels.dtype.kind == "f" else ~pixels
        alpha = bool(page.extrasamples) and page.extrasamples[0] != 0
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE and axes == "YX":
            # 16-bit entries, in which an 8-bit colour v is stored as v * 257.
            pixels = np.moveaxis(np.asarray(page.colormap) >> 8, 0, -1).astype(np.uint8)[pixels]
            axes = "YXS"
    if axes in ("SYX", "CYX") and pixels.shape[0] in (3, 4):
        pixels, axes = np.moveaxis(pixels, 0, -1), "YXS"
    # Beyond grey and RGB, only transparency may be left out.
    if axes == "YX" or (axes in ("YXS", "YXC") and pixels.shape[2] - alpha in (1, 3)):
        return pixels
    shape = " x ".join(f"{n} {a}" for a, n in zip(axes, pixels.shape, strict=True))
    raise InputError(
        f"{name}: a stack, or channels that are not RGB ({shape}); save one grey or RGB plane"
    )


def _read_other(data: bytes, name: str) -> Array:
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10":
        # Pillow reads 16-bit RGB as 8-bit.
        import imagecodecs

        return np.asarray(imagecodecs.png_decode(data))
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
    span = max(high - low, floor)
    # Floating images in double precision, where the widest range of float32 does not overflow.
    wide = image.astype(np.float64 if image.dtype.kind == "f" else np.float32)
    scaled: NDArray[Any] = (np.clip(wide, low, low + span) - low) / span
    np.nan_to_num(scaled, copy=False, nan=0.0)
    return np.asarray(scaled, np.float32)
