"""Read OME-Zarr, a folder of chunks, whole or by windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from cellseg.errors import InputError
from cellseg.reading.recording import (
    LARGE,
    Array,
    Opened,
    Recording,
    Windows,
    arrange,
    check_memory,
    in_micrometres,
    side_of_square,
)

# By their type, whatever their names.
AXES = {"time": "T", "channel": "C"}


def read_zarr(path: Path, name: str, by_windows: bool) -> Recording:
    """The image of a folder at full size.

    Args:
        path: A zarr array, or a group with the `multiscales` of OME-Zarr, up to 0.5.
        name: For errors.
        by_windows: Whether a large one is to be read window by window later.

    Raises:
        InputError: It holds no such image, or several, or the memory cannot hold it.
    """
    pixels, axes, about = _image(path, name)
    shape = dict(zip(axes, pixels.shape, strict=True))
    corner = np.zeros([1 if axis in "YX" else size for axis, size in shape.items()], pixels.dtype)
    recording = arrange(name, corner, axes, False, *about)
    windows = Windows(recording, (shape["Y"], shape["X"]), partial(_open, path, name))
    if by_windows and math.prod(windows.shape[:3]) > LARGE:
        return replace(recording, pixels=windows)
    check_memory(name, math.prod(pixels.shape) * pixels.dtype.itemsize)
    return arrange(name, np.asarray(pixels[...]), axes, False, *about)


def _open(path: Path, name: str) -> Opened:
    pixels, axes, _ = _image(path, name)

    def convert(window: Array) -> tuple[Array, str, bool]:
        return window, axes, False

    return Opened(pixels, axes, convert, lambda: None)


@cache
def _refuse_cut_off_chunks() -> None:
    """Have Blosc look at the length of a chunk before it decodes it.

    It believes the chunk's header, and reads on in whatever lies behind it in memory: other pixels
    each time, or the end of the process.
    """
    import numcodecs  # type: ignore[import-untyped]
    import zarr.codecs.blosc

    class Checked(numcodecs.Blosc):  # type: ignore[misc]
        def decode(self, buf: Any, out: Any = None) -> Any:
            chunk = memoryview(buf).cast("B")
            # https://github.com/Blosc/c-blosc/blob/main/README_CHUNK_FORMAT.rst
            if len(chunk) < int.from_bytes(chunk[12:16], "little"):
                raise ValueError("a chunk is cut off")
            return super().decode(buf, out)

    numcodecs.register_codec(Checked, "blosc")  # of zarr 2
    vars(zarr.codecs.blosc)["Blosc"] = Checked  # of zarr 3, which holds the class itself


def _metadata(group: Any) -> Any:
    return group.attrs.get("ome", group.attrs)


def _image(
    path: Path, name: str
) -> tuple[Any, str, tuple[Sequence[str | None], float | None, float | None]]:
    """The array at full size, its axes; its channels and sizes as `arrange` takes them."""
    import zarr

    _refuse_cut_off_chunks()
    try:
        found = zarr.open(path, mode="r")
    except FileNotFoundError as error:
        raise InputError(f"{name}: a folder, but no zarr image; name the images in it") from error
    if isinstance(found, zarr.Array):
        if not 2 <= found.ndim <= 5:
            raise InputError(f"{name}: an array of {found.ndim} axes; 2 to 5 are read, as tczyx")
        return found, "TCZYX"[-found.ndim :], ((), None, None)
    if "plate" in _metadata(found):
        raise InputError(
            f"{name}: a plate; copy its fields, such as A/1/0, out as folders that end in .zarr"
        )
    if not _metadata(found).get("multiscales"):
        # As bioformats2raw writes it: each image in a group of its own, from 0.
        if "0" not in found or not isinstance(found["0"], zarr.Group):
            raise InputError(
                f"{name}: a zarr group without the multiscales of OME-Zarr; export it anew"
            )
        if "1" in found:
            raise InputError(f"{name}: several images in one; copy their folders out")
        found = found["0"]
    attributes = _metadata(found)
    scales = attributes["multiscales"][0]
    full = scales["datasets"][0]
    # Before 0.4 an axis is a mere name; before 0.3 all are there, in this order.
    named = [a if isinstance(a, dict) else {"name": a} for a in scales.get("axes", "tczyx")]
    axes = "".join(AXES.get(axis.get("type") or "", axis["name"][:1].upper()) for axis in named)
    if len({*axes}) < len(axes) or not {"Y", "X"} <= {*axes}:
        words = ", ".join(axis["name"] for axis in named)
        raise InputError(f"{name}: axes are {words}; export it with y, x and any of t, c and z")
    if full["path"] not in found:
        raise InputError(f"{name}: its full size, {full['path']}, is missing; copy it again")
    channels = (attributes.get("omero") or {}).get("channels") or ()
    labels = [(channel or {}).get("label") for channel in channels]
    names = [None if label is None else str(label) for label in labels]
    # What is said of all levels comes on top of what is said of one.
    steps_of = [*(full.get("coordinateTransformations") or ())]
    steps_of += scales.get("coordinateTransformations") or ()
    scales_of = [step["scale"] for step in steps_of if "scale" in step]
    sizes = {
        axis: in_micrometres(float(math.prod(steps)), str(about.get("unit") or ""))
        for axis, about, *steps in zip(axes, named, *scales_of, strict=True)
        if steps
    }
    pixel_size = side_of_square(sizes.get("X"), sizes.get("Y"))
    return found[full["path"]], axes, (names, pixel_size, sizes.get("Z"))
