"""Which channels of an image show the nuclei, as a picture of three."""

from __future__ import annotations

import re

import numpy as np

from cellseg.errors import InputError
from cellseg.reading.intensity import sampling_step
from cellseg.reading.recording import COLOURS, Array, Recording

# Names of what shows nuclei, as words of a channel's name: "DAPI", "C1-Hoechst 33342", "ch405".
NUCLEAR = re.compile(
    r"(?<![a-z])(?<!non[- ])(dapi|hoechst|h33?342|draq[57]|sytox?|to-?pro-?3|dna|h2b[a-z]*"
    r"|nuc(le(i|us|ar)|blue|green|red|spot)?)(?![a-z])|(?<!\d)405(?!\d)"
)
# Percentile of a colour picture that counts as its brightest.
HIGH = 99.8
# Part of the brightest below which the median is dark. In the Data Science Bowl's 107 stained
# images the median is at least .88 of the brightest.
DARK = 0.5
# Part of the brightest below which the median of a colour is darkness. In the same stained images
# the least is .30 of it.
LEAST_LIGHT = 0.1
# Part of the brightest from which a difference between colours is a tint, and from which a colour
# is there: JPEG at quality 75 adds less to the dark beside one.
TINTED, SHOWN = 0.1, 0.2
FAINT = 0.4  # part of a pixel's brightest: of a colour beside it, and of the tint of a grey
LOOKED_AT = 2**16  # pixels


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
    if len(names) == 1:
        return 0, ""
    words = [{word[0] for word in NUCLEAR.finditer(name)} for name in names]
    common = set.intersection(*words)  # is of the file's name
    for number, own in enumerate(words):
        if own - common:
            return number, ""
    number = names.index("blue") if "blue" in names else 0
    return number, (
        f"{len(names)} channels without a nuclear name of their own, took "
        f"{recording.channels[number]}; --data.channel picks another"
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
    values = values[:: max(1, len(values) // LOOKED_AT)].astype(np.float32)
    values = np.nan_to_num(values, posinf=0, neginf=0)
    if (values == values[:, :1]).all():
        return slice(None), ""
    white = (values == values.max()).all(axis=1)  # as of a scale bar
    high = np.percentile(values[~white], HIGH, axis=0)
    brightest = values.max(axis=1)
    tint = np.percentile(brightest - values.min(axis=1), HIGH)
    # Light through tissue has all colours; cells that fill a field of fluorescence lack one.
    lit = np.median(brightest) >= DARK * high.max()
    lit &= np.median(values, axis=0).min() >= LEAST_LIGHT * high.max()
    if lit or tint < TINTED * high.max():
        return slice(None), ""
    # White text shows no colour, nor does what JPEG adds to a neighbouring one.
    grey = brightest - values.min(axis=1) < FAINT * brightest
    faint = values < FAINT * brightest[:, None]
    values[grey] = 0
    there = np.percentile(values, HIGH, axis=0)  # also where another one outshines it
    high = np.percentile(np.where(faint, 0, values), HIGH, axis=0)
    shown = high > SHOWN * high.max()
    # Where all is pale, blue shows it as well as another.
    number = 2 if shown[2] or not shown.any() else int(high.argmax())
    guess = f"several colours on black, took {COLOURS[number]}; --data.channel picks another"
    several = (there > SHOWN * there.max()).sum() > 1
    return slice(number, number + 1), guess if several else ""


def three(pixels: Array) -> Array:
    """One or three channels as three, without a copy."""
    return np.broadcast_to(pixels, (*pixels.shape[:-1], 3))
