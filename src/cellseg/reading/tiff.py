"""Decode TIFF with its many variants, whole or by windows."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from cellseg.errors import InputError
from cellseg.reading.ome_tiff import own_part
from cellseg.reading.recording import (
    COLOURS,
    LARGE,
    Array,
    File,
    Opened,
    Recording,
    Windows,
    arrange,
    check_memory,
    check_ratio,
    in_micrometres,
    side_of_square,
)

# Photometric interpretations that need no conversion: white is 0, black is 0, RGB, palette.
PLAIN = (0, 1, 2, 3)
# Bytes of the largest tile or strip, which is decoded as one for whatever part of it is read.
LARGEST_CHUNK = 64 * 2**20
# By how much 16-bit colours of a ramp may fall from one to the next: Fire does, by less than this.
RAMP_STEP = 257
# Where a plane is, in the labels that Bio-Formats gives those it opens: "c:1/2 z:3/9 - a.lif".
PLACE = re.compile(r"\b[czt]:\d+/\d+")


def read_tiff(file: File, name: str, path: Path | None) -> Recording | None:
    """A TIFF as it was recorded; None where its colours are for others to convert, as of CMYK.

    Args:
        file: The open file.
        name: For errors.
        path: From where the windows of a large one are read later, as far as the file allows
            that; None to read it whole.

    Raises:
        InputError: See `readers.read_file`.
    """
    import tifffile

    with _opened(file) as tiff:
        series = _single_image(tiff, name)
        page = series.keyframe
        check_ratio(name, series.nbytes, file)
        if _is_cut_off(tiff, series):
            raise InputError(f"{name}: the file is cut off; copy it again")
        if missing := sum(page is None for page in series.pages):
            raise InputError(
                f"{name}: planes that were never recorded: {missing} of {len(series.pages)}; save "
                "those that are there as a TIFF of their own"
            )
        jpeg = page.compression == tifffile.COMPRESSION.JPEG
        if page.photometric not in PLAIN and not (
            jpeg and page.photometric == tifffile.PHOTOMETRIC.YCBCR
        ):
            return None
        about = _metadata(tiff, page)
        if path is not None and _has_windows(series):
            # All but the pixels follows from the axes: one pixel of each plane has them too.
            sizes = [1 if a in "YX" else n for a, n in zip(series.axes, series.shape, strict=True)]
            pixels, axes, colour = _converted(np.zeros(sizes, series.dtype), series.axes, page)
            recording = arrange(name, pixels, axes, colour, *about)
            height, width = (series.shape[series.axes.index(axis)] for axis in "YX")
            windows = Windows(recording, (height, width), partial(_open, path, name))
            if math.prod(windows.shape[:3]) > LARGE:
                return replace(recording, pixels=windows)
        check_memory(name, series.nbytes)
        stored = series.asarray()
        pixels, axes, colour = _converted(stored, series.axes, page)
        recording = arrange(name, pixels, axes, colour, *about)
        looked_up = colour and _has_palette(page, axes)
        entries = arrange(name, stored, series.axes, False).pixels if looked_up else None
        return replace(recording, negative=_white_is_0(page), entries=entries)


def _opened(file: File) -> Any:
    """A TIFF by itself, although OME-TIFF may name others; pages added one by one are a stack."""
    import tifffile

    # By the file's own name tifffile would find those of Micro-Manager's other positions.
    open_alone = partial(tifffile.TiffFile, file, name="alone.tif", _multifile=False)
    tiff = open_alone()
    alike = {(len(s), s.shape, s.dtype, s.axes) for s in tiff.series}
    options: dict[str, Any] = {}
    if tiff.is_shaped and len(tiff.series) > 1 and len(alike) == 1 and len(tiff.series[0]) == 1:
        # By what tifffile has noted in them, each would be an image of its own.
        options = {"is_shaped": False}
    elif tiff.is_ome and any(series.kind != "ome" for series in tiff.series):
        with suppress(ElementTree.ParseError):
            options = {"omexml": own_part(tiff.ome_metadata or "")}
    if options:
        tiff.close()
        file.seek(0)
        tiff = open_alone(**options)
    return tiff


def _open(path: Path, name: str) -> Opened:
    file = path.open("rb")
    tiff = _opened(file)
    series = _single_image(tiff, name)

    def convert(window: Array) -> tuple[Array, str, bool]:
        return _converted(window, series.axes, series.keyframe)

    return Opened(_lazily(series), series.axes, convert, file.close)


def _lazily(series: Any) -> Any:
    """The pixels of a series as an array that is read where it is indexed."""
    if _is_mapped(series):
        return series.asarray(out="memmap")
    import zarr

    return zarr.open_array(series.aszarr(level=0), mode="r")


def _has_windows(series: Any) -> bool:
    """Whether parts of the pixels can be read without the rest."""
    page = series.keyframe
    return _is_mapped(series) or math.prod(page.chunks) * page.dtype.itemsize <= LARGEST_CHUNK


def _is_mapped(series: Any) -> bool:
    """Whether the file holds the pixels as they are, in one piece."""
    return series.keyframe.is_memmappable and series.dataoffset is not None


def _single_image(tiff: Any, name: str) -> Any:
    """The series to segment; of a slide the one at full size, which comes first."""
    if tiff.is_svs:
        return tiff.series[0]
    # Smaller copies besides the image: thumbnails, and pyramids that are not OME's.
    images = [s for s in tiff.series if not s.keyframe.is_reduced] or list(tiff.series)
    if not images:
        raise InputError(f"{name}: no image in it; the file is cut off or damaged; copy it again")
    if len(images) > 1:
        raise InputError(f"{name}: holds {len(images)} images; save the one to segment alone")
    return images[0]


def _converted(pixels: Array, axes: str, page: Any) -> tuple[Array, str, bool]:
    """Pixels with white above black, without alpha and palette; their axes; whether in colour."""
    import tifffile

    if _white_is_0(page):
        pixels = -pixels if pixels.dtype.kind == "f" else ~pixels
    samples, alpha = page.samplesperpixel, bool(page.extrasamples and page.extrasamples[-1])
    colour = samples - alpha == 3 or (samples == 4 and page.photometric == tifffile.PHOTOMETRIC.RGB)
    if alpha and not colour and "S" in axes:
        pixels = pixels.take(range(samples - 1), axis=axes.index("S"))
    if _has_palette(page, axes):
        # 16-bit entries, in which an 8-bit colour v is stored as v * 257.
        palette = (np.asarray(page.colormap) >> 8).T.astype(np.uint8)
        colour = bool((palette != palette[:, :1]).any())
        pixels = palette[pixels] if colour else palette[pixels, 0]
        axes += "S" * colour
    return pixels, axes, colour


def _has_palette(page: Any, axes: str) -> bool:
    """Whether the pixels are entries of a palette.

    Those of channels, ramps of ImageJ, and those of 16-bit pixels only say in which colours they
    are shown.
    """
    import tifffile

    if page.photometric != tifffile.PHOTOMETRIC.PALETTE or "C" in axes or page.bitspersample > 8:
        return False
    return not (page.is_imagej and _is_ramp(page.colormap))


def _is_ramp(palette: Array) -> bool:
    """Whether the colours (3, N) of 16 bits become brighter and brighter, as those of Fire do."""
    brightness = np.array([0.299, 0.587, 0.114]) @ palette
    return bool(np.diff(brightness).min() > -RAMP_STEP)


def _white_is_0(page: Any) -> bool:
    # Of a page that does not say, tifffile says so.
    said = "PhotometricInterpretation" in page.tags
    return said and page.photometric.name == "MINISWHITE"


def _is_cut_off(tiff: Any, series: Any) -> bool:
    size = tiff.filehandle.size
    if _next_page(tiff) >= size:
        return True
    if series.dataoffset is not None:  # in one piece, of which ImageJ may list only the start
        return bool(series.dataoffset + series.nbytes > size)
    # Decoders fill up what a cut-off strip lacks.
    return any(
        offset + count > size
        for page in filter(None, series.pages)
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)
    )


def _next_page(tiff: Any) -> int:
    """Where the page after the last one found should be; 0 where there is none."""
    file, layout = tiff.filehandle, tiff.tiff
    file.seek(tiff.pages.next_page_offset)
    (offset,) = struct.unpack(layout.offsetformat, file.read(layout.offsetsize))
    return int(offset)


def _metadata(tiff: Any, page: Any) -> tuple[Sequence[str | None], float | None, float | None]:
    """Names of the channels, the size of a pixel and the step in z in um, where it has them."""
    names: Sequence[str | None] = ()
    pixel_size = z_step = None
    told = False  # perhaps that pixels are not square
    if tiff.is_ome:
        with suppress(ElementTree.ParseError):
            image = ElementTree.fromstring(tiff.ome_metadata).find(".//{*}Pixels")
            if image is not None:
                names = [_ome_name(channel) for channel in image.iterfind("{*}Channel")]
                x, y, z_step = (
                    in_micrometres(
                        image.get(f"PhysicalSize{axis}"),
                        image.get(f"PhysicalSize{axis}Unit", "um"),
                    )
                    for axis in "XYZ"
                )
                pixel_size = side_of_square(x, y)
                told = x is not None or y is not None
    elif tiff.is_imagej:
        metadata = tiff.imagej_metadata or {}
        count = metadata.get("channels", 0)
        # Labels are per plane, the channel running fastest.
        names = list(metadata.get("Labels") or ())[:count]
        if count > 1 and len({PLACE.sub("", label) for label in names}) == 1:
            names = []  # they say no more than which file it was
        if count > 1 and not names:  # of a single channel the table is no list
            names = [_lut_colour(lut) for lut in metadata.get("LUTs", ())]
        unit = str(metadata.get("unit"))
        pixel_size = _side(page, unit)
        z_step = in_micrometres(metadata.get("spacing"), unit)
    unit = {2: "inch", 3: "cm"}.get(page.resolutionunit, "")
    return names, pixel_size if told else pixel_size or _side(page, unit), z_step


def _side(page: Any, unit: str) -> float | None:
    """Of a pixel in um, by the resolution that TIFF has a tag for."""
    return side_of_square(*(in_micrometres(1 / n, unit) if n else None for n in page.resolution))


def _ome_name(channel: ElementTree.Element) -> str | None:
    """What a channel of OME-XML is called: by its name, else its dye, else its colour (RGBA)."""
    colour = channel.get("Color", "")
    rgba = (int(colour) % 2**32).to_bytes(4, "big") if re.fullmatch(r"-?\d+", colour) else b""
    return channel.get("Name") or channel.get("Fluor") or _pure(np.frombuffer(rgba[:3], np.uint8))


def _lut_colour(lut: Array) -> str | None:
    """The colour that a look-up table (3, 256) runs to, where it is a pure one."""
    return _pure(lut[:, -1])


def _pure(colour: Array) -> str | None:
    return COLOURS[colour.argmax()] if np.count_nonzero(colour) == 1 else None
