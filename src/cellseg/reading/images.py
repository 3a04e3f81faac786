"""Read an image file: one way for training and for prediction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from cellseg.errors import InputError
from cellseg.reading.readers import read_file
from cellseg.reading.recording import Array, Recording

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".svs", ".zarr", ".nd2", ".czi", ".bmp")
# Formats of images that we do not read; `predict` names such files.
UNREAD = (
    *(".gif", ".webp", ".jp2", ".heic", ".lif", ".lsm", ".oib", ".oif", ".vsi", ".ims", ".dv"),
    *(".mrxs", ".ndpi", ".scn", ".stk", ".dcm", ".zarr.zip"),
)


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image we read; hidden files are not."""
    base = name.rsplit("/", 1)[-1]
    return not base.startswith(".") and base.lower().endswith(SUFFIXES)


def read_recording(source: Path | bytes, name: str = "", by_windows: bool = False) -> Recording:
    """All planes and channels of an image file, as they were recorded.

    Args:
        source: The file, or its bytes.
        name: What to call it in errors; the file's path where none is given.
        by_windows: See `read_file`; the windows of such pixels are of the file's own type.

    Returns:
        Its pixels are uint8, uint16 or float32; no other range is promised. 1-bit becomes 0
        and 255.

    Raises:
        InputError: See `read_file`.
    """
    recording = read_file(source, name, by_windows)
    if not isinstance(recording.pixels, np.ndarray):
        return recording
    return replace(recording, pixels=as_number(recording.pixels))


def planes_of(recording: Recording, plane: str) -> tuple[list[tuple[int, ...]], Recording]:
    """The places of which each wanted plane is the maximum, and what the planes are.

    Args:
        recording: What `read_recording` gives.
        plane: "all", "max" (the maximum over the planes, of each point in time) or a plane's
            number, from 0.

    Returns:
        The places, and a recording that tells of what is wanted, with the pixels of all planes.

    Raises:
        InputError: There is no such plane.
    """
    count, axes, shape = recording.pixels.shape[0], recording.plane_axes, recording.plane_shape
    if plane not in ("all", "max", *map(str, range(count))):
        numbers = f"0 to {count - 1}" if count > 1 else "0"
        raise InputError(
            f"{recording.name}: no plane {plane!r}; --data.plane can be {numbers}, max or all"
        )
    if plane == "all" or count == 1:
        return [(place,) for place in range(count)], recording
    if plane == "max" and "T" in axes and len(axes) > 1:
        time = axes.index("T")
        places = np.moveaxis(np.arange(count).reshape(shape), time, 0).reshape(shape[time], -1)
        planes = tuple(range(shape[time]))
        of_time = replace(recording, planes=planes, plane_axes="T", plane_shape=(shape[time],))
        return [tuple(each) for each in places.tolist()], of_time
    wanted = tuple(range(count)) if plane == "max" else (int(plane),)
    planes = () if plane == "max" else wanted
    return [wanted], replace(recording, planes=planes, plane_axes="", plane_shape=())


def select_planes(recording: Recording, plane: str) -> Recording:
    """A recording with its wanted planes; see `planes_of`."""
    places, selected = planes_of(recording, plane)
    if selected is recording:
        return recording
    # Unlike `max`, it passes over NaN; of one plane it is that plane.
    pixels = [np.fmax.reduce(recording.pixels[list(each)]) for each in places]
    return replace(selected, pixels=np.stack(pixels))


def note_on_maximum(plane: str, axes: str) -> str:
    """A note on a maximum over time.

    Args:
        plane: See `planes_of`.
        axes: What the planes of the file are.
    """
    over = plane == "max" and axes == "T"
    return "maximum over time; --data.plane all keeps it apart" if over else ""


def read_one_plane(source: Path | bytes, name: str = "") -> Recording:
    """As `read_recording`, but a stack is refused."""
    return _of_one_plane(read_recording(source, name))


def _of_one_plane(recording: Recording) -> Recording:
    if len(recording.pixels) > 1:
        sizes = zip(recording.plane_shape, recording.plane_axes, strict=True)
        raise InputError(
            f"{recording.name}: a stack of {len(recording.pixels)} planes "
            f"({' x '.join(f'{n} {axis}' for n, axis in sizes)}); save single planes to train on"
        )
    return recording


def as_number(pixels: Array) -> Array:
    """Any real type as uint8, uint16 or float32."""
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    native = pixels.dtype.newbyteorder("=")  # what is mapped from disk may be big-endian
    if native in (np.uint8, np.uint16):
        return pixels.astype(native, copy=False)
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite, and counts as such
        return pixels.astype(np.float32)


def read_labels(source: Path | bytes, name: str = "") -> Array:
    """A mask or label image as (H, W) integers, as stored; colours outside a palette are refused.

    Raises:
        InputError: The file is damaged, a stack or in colour, or holds fractions or negative
            values.
    """
    recording = _of_one_plane(read_file(source, name))
    name, pixels = recording.name, recording.pixels[0]
    if recording.entries is not None:
        background = pixels[recording.entries[0, ..., 0] == 0]
        if (background == background[:, :1]).all():  # black or white: Fiji and QuPath colour labels
            pixels = recording.entries[0]
    if (pixels[..., 1:] != pixels[..., :1]).any():
        raise InputError(f"{name}: a mask in colour; save it as a grey or label image")
    labels: Array = pixels[..., 0]
    if recording.negative:  # Fiji and tifffile say so of masks in which nuclei are not 0
        labels = -labels if labels.dtype.kind == "f" else ~labels
    if labels.dtype.kind == "f":
        if not (np.isfinite(labels).all() and (labels == labels.round()).all()):
            raise InputError(f"{name}: a mask with fractions; save it as whole numbers")
        labels = labels.astype(np.int64)
    if labels.min() < 0:
        raise InputError(f"{name}: a mask with negative values; 0 is the background")
    return labels
