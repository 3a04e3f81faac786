"""An image file as it was recorded, whatever its format."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg.errors import InputError

Array = NDArray[Any]
File = BytesIO | BufferedReader

COLOURS = ("red", "green", "blue")
# Pixels, over all planes, beyond which an image is not held whole, nor all of it looked at for its
# intensities: the network alone takes 2 GB for so many at 16 channels.
LARGE = 2**22
# A constant image compresses about 1,000 to 1; smaller ones do no harm at any ratio.
BOMB_RATIO, BOMB_FLOOR = 1000, 256 * 2**20
# In um; what lies outside is the resolution of a screen or printer: 72 dpi are 353 um.
PIXEL_SIZES = (1e-3, 10.0)
MICROMETRES = {
    **{"nm": 1e-3, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6, "micron": 1.0, "inch": 25400},
    **{"nanometer": 1e-3, "micrometer": 1.0, "millimeter": 1e3, "centimeter": 1e4},
}


@dataclass(frozen=True)
class Recording:
    """An image file as it was recorded.

    Attributes:
        name: What errors call it.
        pixels: (P, H, W, C): planes by rows by columns by channels; an array, or where that was
            asked for `Windows`.
        planes: Number of each plane in the file; empty where it has one, or for a projection.
        plane_axes: What the planes are, such as "TZ"; empty for a single plane.
        plane_shape: How many of each there are, such as (5, 7); their product is P.
        channels: Names: those in the file, else "0", "1" and so on.
        colour: Whether the channels are red, green and blue of one picture.
        pixel_size: Width of a pixel in um; None where the file does not tell, or where pixels are
            not square.
        z_step: Distance of two planes of Z in um; None where the file does not tell.
        negative: Whether the pixels are the negative of those stored, of which white is 0.
        entries: (P, H, W, 1), which entries of a palette of colours the file holds; None without
            one.
    """

    name: str
    pixels: Any
    planes: tuple[int, ...]
    plane_axes: str
    plane_shape: tuple[int, ...]
    channels: tuple[str, ...]
    colour: bool
    pixel_size: float | None
    z_step: float | None = None
    negative: bool = False
    entries: Array | None = None


def arrange(
    name: str,
    pixels: Array,
    axes: str,
    colour: bool,
    names: Sequence[str | None] = (),
    pixel_size: float | None = None,
    z_step: float | None = None,
) -> Recording:
    """Pixels of any axes as planes, rows, columns, channels (C and S; for colour only S)."""
    if pixels.dtype.kind not in "buif":
        raise InputError(f"{name}: pixels of type {pixels.dtype} are no grey levels")
    if 0 in pixels.shape:
        raise InputError(f"{name}: the image has no pixels")
    of_channels = "S" if colour and "S" in axes else "CS"
    channels = [i for i, axis in enumerate(axes) if axis in of_channels]
    planes = [i for i, axis in enumerate(axes) if axis not in of_channels + "YX"]
    count = math.prod(pixels.shape[i] for i in channels)
    sizes = {i: pixels.shape[i] for i in planes if pixels.shape[i] > 1}
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
        z_step=z_step,
    )


@dataclass(frozen=True)
class Opened:
    """A file whose pixels can be read in parts.

    Attributes:
        pixels: Read where it is indexed.
        axes: Of the pixels.
        convert: Makes numbers with white above black of a part; gives them, their axes and whether
            they are in colour.
        close: Closes the file.
    """

    pixels: Any
    axes: str
    convert: Callable[[Array], tuple[Array, str, bool]]
    close: Callable[[], None]


class Windows:
    """Pixels that are read as they are asked for; each process opens the file for itself.

    `windows[plane, rows, columns]`, a number and two slices, is (h, w, C) as the whole would be.

    Args:
        recording: Of the file, with a single pixel of each plane.
        sides: Height and width.
        open: Opens the file.

    Attributes:
        shape: (P, H, W, C).
    """

    def __init__(
        self, recording: Recording, sides: tuple[int, int], open: Callable[[], Opened]
    ) -> None:
        planes, _, _, channels = recording.pixels.shape
        self.shape = (planes, *sides, channels)
        self._name = recording.name
        self._axes, self._sizes = recording.plane_axes, recording.plane_shape
        self._open = open
        self._opened: Opened | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __getitem__(self, place: tuple[int, slice, slice]) -> Array:
        try:
            return self._read(*place)
        except InputError:
            raise
        except Exception as error:  # each decoder has exceptions of its own for damage
            raise unreadable(self._name, error) from error

    def _read(self, plane: int, rows: slice, columns: slice) -> Array:
        opened = self._opened = self._opened or self._open()
        numbers = iter(np.unravel_index(plane, self._sizes) if self._sizes else ())
        where: list[slice] = []
        for axis, length in zip(opened.axes, opened.pixels.shape, strict=True):
            if axis in self._axes and length > 1:  # others may have the same name
                number = int(next(numbers))
                where.append(slice(number, number + 1))
            else:
                where.append({"Y": rows, "X": columns}.get(axis, slice(None)))
        window, axes, colour = opened.convert(np.asarray(opened.pixels[tuple(where)]))
        return np.asarray(arrange(self._name, window, axes, colour).pixels[0])

    def close(self) -> None:
        """Close the file; it is opened again where a window is asked for."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None


def check_claim(name: str, claim: int, file: File) -> None:
    """Refuse pixels of so many bytes that neither the file nor the memory can hold them."""
    check_ratio(name, claim, file)
    check_memory(name, claim)


def check_ratio(name: str, claim: int, file: File) -> None:
    """Refuse what the header says is too large for the file, before anything is decoded.

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


def check_memory(name: str, claim: int) -> None:
    """Refuse pixels of so many bytes that the memory cannot hold them."""
    if claim > memory_limit():
        raise InputError(
            f"{name}: {claim / 2**30:,.1f} GiB of pixels, over half of this machine's memory; "
            "save it as a tiled TIFF, which is read part by part, or cut it up"
        )


@cache
def memory_limit() -> int:
    """Bytes that the pixels of a file may take: half of what this process may have."""
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows
        machine = 16 * 2**30
    return min([machine, *granted_memory()]) // 2


def granted_memory(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Bytes that the control groups of this process allow it, as SLURM and containers set them.

    Args:
        groups: Where Linux lists them.
        root: Where it shows them.
    """
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        group = root / controllers / name.lstrip("/")
        for folder in (group, *group.parents):  # a container does not see the outer ones
            with suppress(OSError, ValueError):  # "max" is no limit
                limit = "memory.limit_in_bytes" if controllers else "memory.max"
                yield int((folder / limit).read_text())


def unreadable(name: str, error: Exception) -> InputError:
    """What to raise where a decoder has failed."""
    if isinstance(error, MemoryError):
        return InputError(f"{name}: not enough memory left; --data.num_workers 0 needs less")
    of_system = error.strerror if isinstance(error, OSError) else ""
    cause = " ".join((of_system or str(error)).split()) or type(error).__name__
    way_out = "" if of_system else "; copy it again, or save it anew"
    return InputError(f"{name}: cannot be read: {cause}{way_out}")


def side_of_square(width: float | None, height: float | None) -> float | None:
    """The side of a pixel; None where it is no square, so that no area comes out wrong."""
    if width is None or height is None:
        return width
    return width if math.isclose(width, height, rel_tol=0.01) else None


def in_micrometres(size: Any, unit: str) -> float | None:
    """A pixel size that a microscope can have, in um; else None, as for what is no number."""
    try:
        size = float(size)
    except (TypeError, ValueError):
        return None
    for mu in ("\N{MICRO SIGN}", "\N{GREEK SMALL LETTER MU}", r"\u00B5"):  # ImageJ escapes it
        unit = unit.replace(mu, "u")
    unit = unit.lower().removesuffix("s").replace("metre", "meter")
    size *= MICROMETRES.get(unit, math.nan)
    return size if PIXEL_SIZES[0] < size < PIXEL_SIZES[1] else None
