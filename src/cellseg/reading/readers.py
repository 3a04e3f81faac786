"""Decode the image formats of microscopes, each into a `Recording`."""

from __future__ import annotations

import math
import stat
import warnings
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image, UnidentifiedImageError

from cellseg.errors import InputError
from cellseg.reading.ome_zarr import read_zarr
from cellseg.reading.recording import (
    File,
    Recording,
    arrange,
    check_claim,
    in_micrometres,
    side_of_square,
    unreadable,
)
from cellseg.reading.tiff import read_tiff

# Pillow's formats that are read, whatever a file's name says; others would run Ghostscript (EPS).
PILLOW = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP")


def read_file(source: Path | bytes, name: str = "", by_windows: bool = False) -> Recording:
    """A recording with its pixels in the file's own type.

    A palette is looked up, transparency is dropped, CMYK is converted, and a TIFF whose white
    is 0 is inverted.

    Args:
        source: The file, or its bytes.
        name: What to call it in errors; the file's path where none is given.
        by_windows: Leave the pixels in the file, where its format can be read in parts.

    Raises:
        InputError: The file is damaged, holds several images or needs an extra, or its header
            claims more than it can hold or than fits the memory.
    """
    name = name or str(source)
    try:
        if isinstance(source, Path):
            kind = source.stat().st_mode
            if stat.S_ISDIR(kind):
                return read_zarr(source, name, by_windows)
            if not stat.S_ISREG(kind):  # a pipe would be waited for
                raise InputError(f"{name}: neither a file nor a folder; leave it out")
        with BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            path = source if by_windows and isinstance(source, Path) else None
            return _by_content(file, name, path)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: not an image, or damaged; copy it again") from error
    except Exception as error:  # each decoder has exceptions of its own for damage
        raise unreadable(name, error) from error


def _by_content(file: File, name: str, path: Path | None) -> Recording:
    head = file.read(12)
    if not head:
        raise InputError(f"{name}: the file is empty; copy it again")
    file.seek(0)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        recording = read_tiff(file, name, path)
        if recording is not None:
            return recording
        file.seek(0)
    if head[:10] == b"ZISRAWFILE":
        return _read_czi(file, name)
    old_nd2 = head[4:8] == b"jP  " and name.lower().endswith(".nd2")  # JPEG 2000 before 2010
    if head[:4] == b"\xda\xce\xbe\x0a" or old_nd2:
        return _read_nd2(file, name)
    return _read_other(file, name)


def _read_other(file: File, name: str) -> Recording:
    Image.MAX_IMAGE_PIXELS = None  # it is below a slide's size; `check_claim` has our own
    with Image.open(file, formats=PILLOW) as picture:
        frames = getattr(picture, "n_frames", 1)
        if frames > 1 and picture.format != "MPO":  # of a phone, whose first is the picture
            raise InputError(f"{name}: holds {frames} frames; save the one to segment")
        file.seek(24)
        deep = picture.format == "PNG" and file.read(1) == b"\x10"
        bytes_each = 2 if deep else 4 if picture.mode in ("I", "F") else 1
        claim = picture.width * picture.height * len(picture.getbands()) * bytes_each
        check_claim(name, claim, file)
        entries = None
        if deep:
            # Pillow reads 16-bit RGB as 8-bit.
            import imagecodecs

            file.seek(0)
            pixels = np.asarray(imagecodecs.png_decode(file.read()))
        elif picture.mode in ("1", "L", "LA", "RGB", "RGBA") or picture.mode[0] in "IF":
            pixels = np.asarray(picture)
        else:
            pixels = np.asarray(picture.convert("RGB"))
            if picture.mode == "P" and (pixels != pixels[..., :1]).any():
                entries = np.asarray(picture)[None, ..., None]
    pixels = np.atleast_3d(pixels)
    colour = pixels.shape[2] > 2
    recording = arrange(name, pixels if colour else pixels[..., :1], "YXS", colour)
    return replace(recording, entries=entries)


def _read_nd2(file: File, name: str) -> Recording:
    try:
        import nd2
    except ImportError as error:
        raise _missing(name, ".nd2", "nd2") from error

    with nd2.ND2File(file) as stack:
        axes, shape = "".join(stack.sizes), tuple(stack.sizes.values())
        check_claim(name, math.prod(shape) * stack.dtype.itemsize, file)
        pixels = stack.asarray().reshape(shape)
        channels = stack.metadata.channels or ()
        sides: list[float | None] = [None] * 3
        if channels:
            volume = channels[0].volume
            known = zip(volume.axesCalibrated, volume.axesCalibration, strict=True)
            sides = [
                in_micrometres(side, "um") if calibrated else None for calibrated, side in known
            ]
    names = [channel.channel.name for channel in channels]
    return arrange(name, pixels, axes, "S" in axes, names, side_of_square(*sides[:2]), sides[2])


def _read_czi(file: File, name: str) -> Recording:
    try:
        import czifile
    except ImportError as error:
        raise _missing(name, ".czi", "'czifile<2026'") from error

    with czifile.CziFile(file) as czi:
        sizes = dict(zip(czi.axes, czi.shape, strict=True))
        if sizes.get("S", 1) > 1:
            raise InputError(f"{name}: holds {sizes['S']} scenes; save the one to segment alone")
        for block in czi.filtered_subblock_directory:
            if block.compression not in czifile.czifile.DECOMPRESS:
                raise InputError(f"{name}: compressed in a way that is not known; save it as TIFF")
            if block.shape != block.stored_shape:
                raise InputError(f"{name}: holds smaller copies of itself; save it as TIFF")
        check_claim(name, math.prod(czi.shape) * czi.dtype.itemsize, file)
        # Zeros between the tiles; one thread, since errors in others are lost.
        pixels = np.zeros(czi.shape, czi.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a tile that does not fit
            czi.asarray(out=pixels, max_workers=1)
        metadata = ElementTree.fromstring(czi.metadata() or "<none/>")
    names = [c.get("Name") for c in metadata.iterfind(".//Image/Dimensions/Channels/Channel")]
    x, y, z = (
        in_micrometres(text, "m")
        for axis in "XYZ"
        for text in [metadata.findtext(f".//Scaling/Items/Distance[@Id='{axis}']/Value")]
    )
    # Every file has all axes, most of them of length 1. CZI calls scenes S and samples 0.
    single = [i for i, axis in enumerate(czi.axes) if sizes[axis] == 1 and axis not in "YX"]
    axes = "".join(axis for i, axis in enumerate(czi.axes) if i not in single).replace("0", "S")
    pixels = pixels.squeeze(tuple(single))
    colour = sizes["0"] in (3, 4)
    return arrange(name, pixels, axes, colour, names, side_of_square(x, y), z)


def _missing(name: str, suffix: str, package: str) -> InputError:
    return InputError(
        f"{name}: reading {suffix} needs the extra `vendor`, or just pip install {package}"
    )
