"""Read an image file and normalise it: one way for training and for prediction."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cellseg.data.readers import decode
from cellseg.data.recording import COLOURS, LARGE, Array, Recording
from cellseg.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".svs", ".zarr", ".nd2", ".czi")
# Written into our TIFFs, so that a later run does not take them for images.
SOFTWARE = "cellseg"
# Names of what shows nuclei, as words of a channel's name: "DAPI", "C1-Hoechst 33342", "ch405".
NUCLEAR = re.compile(
    r"(?<![a-z])(dapi|hoechst|h33?342|draq[57]|syto|dna|h2b|nucle(i|us|ar))(?![a-z])"
    r"|(?<!\d)405(?!\d)"
)
# Of a colour picture, which percentile counts as its brightest; below which part of that the median
# is dark; which part of it a difference between colours makes a tint, and a colour to be there. In
# the Data Science Bowl's 107 stained images the median is at least .88 of the brightest.
HIGH, DARK, TINTED, SHOWN = 99.8, 0.5, 0.1, 0.1
LOOKED_AT = 2**16  # pixels


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image we read; hidden files are not."""
    base = name.rsplit("/", 1)[-1]
    return not base.startswith(".") and base.lower().endswith(SUFFIXES)


def read_recording(source: Path | bytes, name: str = "", by_windows: bool = False) -> Recording:
    """All planes and channels of an image file, as they were recorded.

    Args:
        source: The file, or its bytes.
        name: What to call it in errors; the file's path where none is given.
        by_windows: See `decode`; the windows of such pixels are of the file's own type.

    Returns:
        Its pixels are uint8, uint16 or float32; no other range is promised. 1-bit becomes 0
        and 255.

    Raises:
        InputError: See `decode`.
    """
    recording = decode(source, name, by_windows)
    if not isinstance(recording.pixels, np.ndarray):
        return recording
    return replace(recording, pixels=as_number(recording.pixels))


def planes_of(recording: Recording, plane: str) -> tuple[int, ...]:
    """The places of the planes that are wanted; for their maximum, of all.

    Args:
        recording: What `read_recording` gives.
        plane: "all", "max" (the maximum over the planes) or a plane's number, from 0.

    Raises:
        InputError: There is no such plane.
    """
    count = recording.pixels.shape[0]
    if plane in ("all", "max"):
        return tuple(range(count))
    if plane not in map(str, range(count)):
        raise InputError(
            f"{recording.name}: no plane {plane!r}; --data.plane can be 0 to {count - 1}, "
            "max or all"
        )
    return (int(plane),)


def select_planes(recording: Recording, plane: str) -> Recording:
    """A recording with all its planes or one of them; see `planes_of`."""
    places = planes_of(recording, plane)
    if plane == "all" or len(recording.pixels) == 1:
        return recording
    if plane == "max":
        # Unlike `max`, it passes over NaN.
        pixels = np.fmax.reduce(recording.pixels, axis=0, keepdims=True)
        places = ()
    else:
        pixels = recording.pixels[places[0], None]
    return replace(recording, pixels=pixels, planes=places, plane_axes="", plane_shape=())


def to_rgb_planes(recording: Recording, channel: str | None = None) -> tuple[Array, str]:
    """The planes of a recording as pictures of three channels; see `channels_of`.

    Returns:
        (P, H, W, 3), which may be read-only; and a note on a choice that may be wrong, else "".
    """
    channels, note = channels_of(recording, channel)
    if recording.colour and channel is None:
        step = sampling_step(recording.pixels.shape[:-1])
        channels, note = colours_of(recording.pixels[..., ::step, ::step, :])
    return three(recording.pixels[..., channels]), note


def channels_of(recording: Recording, channel: str | None) -> tuple[slice, str]:
    """The channels to find nuclei in, one or three.

    Args:
        recording: What `read_recording` gives.
        channel: Name or number of the channel to take, from 0. None takes all colours, see
            `colours_of`, and of other channels the first with a nuclear name, else a blue one, as
            nuclei are usually shown, else the first.

    Returns:
        Where they are, and a note on a choice that may be wrong, else "".

    Raises:
        InputError: There is no such channel.
    """
    if recording.colour and channel is None:
        return slice(None), ""
    number, note = _choose_channel(recording, channel)
    return slice(number, number + 1), note


def _choose_channel(recording: Recording, channel: str | None) -> tuple[int, str]:
    """The number of the wanted channel, and a note where it was a guess."""
    names = [name.lower() for name in recording.channels]
    if channel is not None:
        if channel.lower() in names:
            return names.index(channel.lower()), ""
        if channel in map(str, range(len(names))):
            return int(channel), ""
        known = (n if n == str(i) else f"{i} ({n})" for i, n in enumerate(recording.channels))
        raise InputError(
            f"{recording.name}: no channel {channel!r}; --data.channel can be {', '.join(known)}"
        )
    for number, name in enumerate(names):
        if NUCLEAR.search(name) or len(names) == 1:
            return number, ""
    number = names.index("blue") if "blue" in names else 0
    return number, (
        f"{len(names)} channels without a nuclear name, took {recording.channels[number]}; "
        "--data.channel picks another"
    )


def colours_of(seen: Array) -> tuple[slice, str]:
    """The channels of a colour picture to find nuclei in: all, or one where it is fluorescence.

    Stained tissue is bright, and its colours tell what is a nucleus. On black, colours are those
    of a microscope's dyes or of whoever has chosen them: nuclei are usually shown in blue, and
    where nothing is blue the brightest one is taken.

    Args:
        seen: (..., 3) of some of its pixels or of all.

    Returns:
        Where they are, and a note where other channels show something too, else "".
    """
    values = seen.reshape(-1, 3)
    if (values == values[:, :1]).all():
        return slice(None), ""
    values = values[:: max(1, len(values) // LOOKED_AT)].astype(np.float32)
    values = np.nan_to_num(values, posinf=0, neginf=0)
    high = np.percentile(values, HIGH, axis=0)
    brightest = values.max(axis=1)
    tint = np.percentile(brightest - values.min(axis=1), HIGH)
    if np.median(brightest) >= DARK * high.max() or tint < TINTED * high.max():
        return slice(None), ""
    shown = high > SHOWN * high.max()
    number = 2 if shown[2] else int(high.argmax())
    guess = f"several colours on black, took {COLOURS[number]}; --data.channel picks another"
    return slice(number, number + 1), guess if shown.sum() > 1 else ""


def read_image(source: Path | bytes, name: str = "", channel: str | None = None) -> Array:
    """An image of one plane, as three channels.

    Args:
        source: The file, or its bytes.
        name: What to call it in errors; the file's path where none is given.
        channel: See `to_rgb_planes`.

    Returns:
        (H, W, 3), which may be read-only: uint8, uint16 or float32; no other range is promised.

    Raises:
        InputError: The file is damaged or a stack, or has no such channel.
    """
    return np.asarray(to_rgb_planes(read_one_plane(source, name), channel)[0][0])


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


def to_rgb(pixels: Array) -> Array:
    """Pixels (H, W) or (H, W, 1 to 4) as (H, W, 3), without what is alpha in PNG; read-only."""
    pixels = np.atleast_3d(pixels)
    return three(as_number(pixels[..., : 3 if pixels.shape[2] > 2 else 1]))


def three(pixels: Array) -> Array:
    """One or three channels as three, without a copy."""
    return np.broadcast_to(pixels, (*pixels.shape[:-1], 3))


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
    """A mask or label image as (H, W) integers, as stored; colours are refused.

    Raises:
        InputError: The file is damaged, a stack or in colour, or holds fractions or negative
            values.
    """
    recording = _of_one_plane(decode(source, name))
    name, pixels = recording.name, recording.pixels[0]
    if (pixels[..., 1:] != pixels[..., :1]).any():
        raise InputError(f"{name}: a mask in colour; save it as a grey or label image")
    labels: Array = pixels[..., 0]
    if labels.dtype.kind == "f":
        if not (np.isfinite(labels).all() and (labels == labels.round()).all()):
            raise InputError(f"{name}: a mask with fractions; save it as whole numbers")
        labels = labels.astype(np.int64)
    if labels.min() < 0:
        raise InputError(f"{name}: a mask with negative values; 0 is the background")
    return labels


def intensity_limits(image: Array, percentiles: tuple[float, float]) -> Array:
    """The two intensities that `normalise` maps to 0 and 1: percentiles of all channels.

    NaN and infinite pixels do not count. One pair for the three channels keeps the colours
    of a stain apart. Of a large image every n-th pixel of every n-th row is looked at.

    Args:
        image: (H, W, C) or (P, H, W, C) of any type.
        percentiles: Low and high, in percent.

    Returns:
        (2,) float64, low and high; both 0 where no pixel is finite.
    """
    step = sampling_step(image.shape[:-1])
    return limits_of(image[..., ::step, ::step, :], percentiles)


def limits_of(values: Array, percentiles: tuple[float, float]) -> Array:
    """As `intensity_limits`, of all values."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        values = values[np.isfinite(values)]
        if values.size == 0:
            return np.zeros(2)
    return np.percentile(values, percentiles)


def sampling_step(shape: Sequence[int]) -> int:
    """Of every how many rows and columns one is enough to know the intensities of (..., H, W)."""
    return math.ceil(math.sqrt(max(1.0, math.prod(shape) / LARGE)))


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
    scaled: Array = (np.clip(wide, low, low + span) - low) / span
    if image.dtype.kind == "f":
        np.nan_to_num(scaled, copy=False, nan=0.0)
    return np.asarray(scaled, np.float32)
