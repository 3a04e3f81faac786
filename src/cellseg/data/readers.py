"""Decode the image formats of microscopes, each into a `Recording`."""

from __future__ import annotations

import math
import os
import struct
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cellseg.errors import InputError

Array = NDArray[Any]
File = BytesIO | BufferedReader

COLOURS = ("red", "green", "blue")
# TIFF photometric interpretations that need no conversion: white is 0, black is 0, RGB, palette.
PLAIN = (0, 1, 2, 3)
# A constant image compresses about 1,000 to 1; smaller ones do no harm at any ratio.
BOMB_RATIO, BOMB_FLOOR = 1000, 256 * 2**20
# In um; what lies outside is the resolution of a screen or printer: 72 dpi are 353 um.
PIXEL_SIZES = (1e-3, 10.0)
MICROMETRES = {"nm": 1e-3, "um": 1.0, "micron": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6, "inch": 25400}


@dataclass(frozen=True)
class Recording:
    """An image file as it was recorded.

    Attributes:
        name: What errors call it.
        pixels: (P, H, W, C): planes by rows by columns by channels.
        planes: Number of each plane in the file; empty where it has one, or for a projection.
        plane_axes: What the planes are, such as "TZ"; empty for a single plane.
        plane_shape: How many of each there are, such as (5, 7); their product is P.
        channels: Names: those in the file, else "0", "1" and so on.
        colour: Whether the channels are red, green and blue of one picture.
        pixel_size: Width of a pixel in um; None where the file does not tell.
    """

    name: str
    pixels: Array
    planes: tuple[int, ...]
    plane_axes: str
    plane_shape: tuple[int, ...]
    channels: tuple[str, ...]
    colour: bool
    pixel_size: float | None


def decode(source: Path | bytes, name: str = "") -> Recording:
    """A recording with its pixels in the file's own type.

    A palette is looked up, transparency is dropped, CMYK is converted, and a TIFF whose white
    is 0 is inverted.

    Args:
        source: The file, or its bytes.
        name: What to call it in errors; the file's path where none is given.

    Raises:
        InputError: The file is damaged, holds several images or needs an extra, or its header
            claims more than it can hold or than fits the memory.
    """
    name = name or str(source)
    with BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        head = file.read(12)
        if not head:
            raise InputError(f"{name}: the file is empty")
        file.seek(0)
        try:
            if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                return _read_tiff(file, name)
            if head[:10] == b"ZISRAWFILE":
                return _read_czi(file, name)
            if head[:4] == b"\xda\xce\xbe\x0a" or head[4:8] == b"jP  ":  # JPEG 2000 before 2010
                return _read_nd2(file, name)
            return _read_other(file, name)
        except InputError:
            raise
        except UnidentifiedImageError as error:
            raise InputError(f"{name}: not an image, or damaged at its start") from error
        except Exception as error:  # each decoder has exceptions of its own for damage
            cause = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{name}: cannot be read: {cause}") from error


def _read_tiff(file: File, name: str) -> Recording:
    import tifffile

    # Each file for itself, although OME-TIFF may name others that go with it.
    with tifffile.TiffFile(file, _multifile=False) as tiff:
        # Smaller copies besides the image: thumbnails, and pyramids that are not OME's.
        images = [s for s in tiff.series if not s.keyframe.is_reduced] or list(tiff.series)
        if not images:
            raise InputError(f"{name}: no image in it; the file is cut off or damaged")
        if len(images) > 1:
            raise InputError(f"{name}: holds {len(images)} images; save the one to segment alone")
        series, page = images[0], images[0].keyframe
        _check_claim(name, series.nbytes, file)
        if _is_cut_off(tiff, series):
            raise InputError(f"{name}: the file is cut off")
        jpeg = page.compression == tifffile.COMPRESSION.JPEG
        if page.photometric not in PLAIN and not (
            jpeg and page.photometric == tifffile.PHOTOMETRIC.YCBCR
        ):
            file.seek(0)
            return _read_other(file, name)  # CMYK and the like: Pillow converts them
        pixels, axes = series.asarray(), series.axes
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            pixels = -pixels if pixels.dtype.kind == "f" else ~pixels
        samples, alpha = page.samplesperpixel, bool(page.extrasamples and page.extrasamples[-1])
        colour = samples - alpha == 3 or (
            samples == 4 and page.photometric == tifffile.PHOTOMETRIC.RGB
        )
        if alpha and not colour and "S" in axes:
            pixels = pixels.take(range(samples - 1), axis=axes.index("S"))
        # The palettes of channels only say in which colour ImageJ shows them.
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE and "C" not in axes:
            # 16-bit entries, in which an 8-bit colour v is stored as v * 257.
            palette = (np.asarray(page.colormap) >> 8).T.astype(np.uint8)
            colour = bool((palette != palette[:, :1]).any())
            pixels = palette[pixels] if colour else palette[pixels, 0]
            axes += "S" * colour
        names, pixel_size = _tiff_metadata(tiff, page)
    return _arrange(name, pixels, axes, colour, names, pixel_size)


def _is_cut_off(tiff: Any, series: Any) -> bool:
    size = tiff.filehandle.size
    if _next_page(tiff) >= size:
        return True
    if series.dataoffset is not None:  # in one piece, of which ImageJ may list only the start
        return bool(series.dataoffset + series.nbytes > size)
    return any(
        page is None
        # Decoders fill up what a cut-off strip lacks.
        or any(
            offset + count > size
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)
        )
        for page in series.pages
    )


def _next_page(tiff: Any) -> int:
    """Where the page after the last one found should be; 0 where there is none."""
    file, layout = tiff.filehandle, tiff.tiff
    file.seek(tiff.pages[-1].offset)
    (tags,) = struct.unpack(layout.tagnoformat, file.read(layout.tagnosize))
    file.seek(tags * layout.tagsize, os.SEEK_CUR)
    (offset,) = struct.unpack(layout.offsetformat, file.read(layout.offsetsize))
    return int(offset)


def _tiff_metadata(tiff: Any, page: Any) -> tuple[Sequence[str | None], float | None]:
    """Names of the channels, where there are any, and the size of a pixel in um."""
    names: Sequence[str | None] = ()
    pixel_size = None
    if tiff.is_ome:
        with suppress(ElementTree.ParseError):
            image = ElementTree.fromstring(tiff.ome_metadata).find(".//{*}Pixels")
            if image is not None:
                names = [channel.get("Name") for channel in image.iterfind("{*}Channel")]
                width = float(image.get("PhysicalSizeX", "nan"))
                pixel_size = _in_micrometres(width, image.get("PhysicalSizeXUnit", "um"))
    elif tiff.is_imagej:
        metadata = tiff.imagej_metadata or {}
        count = metadata.get("channels", 0)
        # Labels are per plane, the channel running fastest.
        names = list(metadata.get("Labels") or ())[:count]
        if count > 1 and not names:  # of a single channel the table is no list
            names = [_lut_colour(lut) for lut in metadata.get("LUTs", ())]
        if page.resolution[0]:
            pixel_size = _in_micrometres(1 / page.resolution[0], str(metadata.get("unit")))
    if pixel_size is None and page.resolution[0]:
        unit = {2: "inch", 3: "cm"}.get(page.resolutionunit, "")
        pixel_size = _in_micrometres(1 / page.resolution[0], unit)
    return names, pixel_size


def _lut_colour(lut: Array) -> str | None:
    """The colour that a look-up table (3, 256) runs to, where it is a pure one."""
    brightest = lut[:, -1]
    return COLOURS[brightest.argmax()] if np.count_nonzero(brightest) == 1 else None


def _in_micrometres(size: float, unit: str) -> float | None:
    for mu in ("\N{MICRO SIGN}", "\N{GREEK SMALL LETTER MU}", r"\u00B5"):  # ImageJ escapes it
        unit = unit.replace(mu, "u")
    size *= MICROMETRES.get(unit.lower().removesuffix("s"), math.nan)
    return size if PIXEL_SIZES[0] < size < PIXEL_SIZES[1] else None


def _read_other(file: File, name: str) -> Recording:
    Image.MAX_IMAGE_PIXELS = memory_limit()  # Pillow's own limit is below a slide's size
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name}: larger than the memory allows; cut it into parts") from error
    with picture:
        frames = getattr(picture, "n_frames", 1)
        if frames > 1:
            raise InputError(f"{name}: holds {frames} frames; save the one to segment")
        file.seek(24)
        deep = picture.format == "PNG" and file.read(1) == b"\x10"
        bytes_each = 2 if deep else 4 if picture.mode in ("I", "F") else 1
        claim = picture.width * picture.height * len(picture.getbands()) * bytes_each
        _check_claim(name, claim, file)
        if deep:
            # Pillow reads 16-bit RGB as 8-bit.
            import imagecodecs

            file.seek(0)
            pixels = np.asarray(imagecodecs.png_decode(file.read()))
        elif picture.mode in ("1", "L", "LA", "RGB", "RGBA") or picture.mode[0] in "IF":
            pixels = np.asarray(picture)
        else:
            pixels = np.asarray(picture.convert("RGB"))
    pixels = np.atleast_3d(pixels)
    colour = pixels.shape[2] > 2
    return _arrange(name, pixels if colour else pixels[..., :1], "YXS", colour)


def _read_nd2(file: File, name: str) -> Recording:
    try:
        import nd2
    except ImportError as error:
        raise _missing(name, ".nd2") from error

    with nd2.ND2File(file) as stack:
        axes, shape = "".join(stack.sizes), tuple(stack.sizes.values())
        _check_claim(name, math.prod(shape) * stack.dtype.itemsize, file)
        pixels = stack.asarray().reshape(shape)
        channels = stack.metadata.channels or ()
        pixel_size = None
        if channels and channels[0].volume.axesCalibrated[0]:
            pixel_size = _in_micrometres(channels[0].volume.axesCalibration[0], "um")
    names = [channel.channel.name for channel in channels]
    return _arrange(name, pixels, axes, "S" in axes, names, pixel_size)


def _read_czi(file: File, name: str) -> Recording:
    try:
        import czifile
    except ImportError as error:
        raise _missing(name, ".czi") from error

    with czifile.CziFile(file) as czi:
        sizes = dict(zip(czi.axes, czi.shape, strict=True))
        if sizes.get("S", 1) > 1:
            raise InputError(f"{name}: holds {sizes['S']} scenes; save the one to segment alone")
        for block in czi.filtered_subblock_directory:
            if block.compression not in czifile.czifile.DECOMPRESS:
                raise InputError(f"{name}: compressed in a way that is not known; save it as TIFF")
            if block.shape != block.stored_shape:
                raise InputError(f"{name}: holds smaller copies of itself; save it as TIFF")
        _check_claim(name, math.prod(czi.shape) * czi.dtype.itemsize, file)
        # Zeros between the tiles; one thread, since errors in others are lost.
        pixels = np.zeros(czi.shape, czi.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a tile that does not fit
            czi.asarray(out=pixels, max_workers=1)
        metadata = ElementTree.fromstring(czi.metadata() or "<none/>")
    names = [c.get("Name") for c in metadata.iterfind(".//Image/Dimensions/Channels/Channel")]
    width = metadata.findtext(".//Scaling/Items/Distance[@Id='X']/Value")
    # Every file has all axes, most of them of length 1. CZI calls scenes S and samples 0.
    single = [i for i, axis in enumerate(czi.axes) if sizes[axis] == 1 and axis not in "YX"]
    axes = "".join(axis for i, axis in enumerate(czi.axes) if i not in single).replace("0", "S")
    pixels = pixels.squeeze(tuple(single))
    colour = sizes["0"] in (3, 4)
    return _arrange(name, pixels, axes, colour, names, _in_micrometres(float(width or 0), "m"))


def _missing(name: str, suffix: str) -> InputError:
    return InputError(f"{name}: reading {suffix} needs the extra: pip install 'cellseg[vendor]'")


def _arrange(
    name: str,
    pixels: Array,
    axes: str,
    colour: bool,
    names: Sequence[str | None] = (),
    pixel_size: float | None = None,
) -> Recording:
    """Pixels of any axes as planes, rows, columns, channels (C and S; for colour only S)."""
    if pixels.dtype.kind not in "buif":
        raise InputError(f"{name}: pixels of type {pixels.dtype} are not supported")
    if 0 in pixels.shape:
        raise InputError(f"{name}: the image has no pixels")
    of_channels = "S" if colour and "S" in axes else "CS"
    channels = [i for i, axis in enumerate(axes) if axis in of_channels]
    planes = [i for i, axis in enumerate(axes) if axis not in of_channels + "YX"]
    count = math.prod(pixels.shape[i] for i in channels)
    sizes = {i: pixels.shape[i] for i in planes}
    height, width = (pixels.shape[axes.index(axis)] for axis in "YX")
    pixels = pixels.transpose(*planes, axes.index("Y"), axes.index("X"), *channels)
    pixels = pixels.reshape(-1, height, width, count)
    colour = colour and count >= 3
    if colour:
        pixels, names = pixels[..., :3], COLOURS
    elif len(names) != count:
        names = [None] * count
    return Recording(
        name=name,
        pixels=pixels,
        planes=tuple(range(len(pixels))) if len(pixels) > 1 else (),
        plane_axes="".join(axes[i] for i in sizes),
        plane_shape=tuple(sizes.values()),
        channels=tuple(channel or str(i) for i, channel in enumerate(names)),
        colour=colour,
        pixel_size=pixel_size,
    )


def _check_claim(name: str, claim: int, file: File) -> None:
    """Refuse what the header says is too large, before anything is decoded.

    Args:
        name: For the error.
        claim: Bytes of the pixels.
        file: What they are to come from.
    """
    size = file.seek(0, os.SEEK_END)
    if claim > max(BOMB_FLOOR, BOMB_RATIO * size):
        raise InputError(
            f"{name}: its header claims {claim / 2**20:,.0f} MiB, over {BOMB_RATIO:,} times the "
            "file's size; it is damaged or a decompression bomb"
        )
    if claim > memory_limit():
        raise InputError(
            f"{name}: {claim / 2**30:,.1f} GiB of pixels, over half of this machine's memory; "
            "cut it into parts"
        )


def memory_limit() -> int:
    """Bytes that the pixels of a file may take: half the machine's memory."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError):  # Windows
        return 8 * 2**30
