"""Images that are too large to be held whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellseg.reading.channels import channels_of, colours_of, three
from cellseg.reading.images import as_number, planes_of
from cellseg.reading.intensity import (
    limits_of,
    noise_of,
    normalise,
    note_on_contrast,
    note_on_holes,
    sampling_step,
    to_tensor,
)
from cellseg.reading.padding import find_padding, padding_in, without_flat_borders
from cellseg.reading.recording import Array, Recording, Windows
from cellseg.tiles import parts

# Side in px of the windows that are read to look at the whole.
WINDOW = 1024


class LargeImage:
    """An image of which windows are read as they are needed; each process reads for itself.

    Args:
        recording: Its pixels are an array or `Windows`.
        plane: See `images.planes_of`.
        channel: See `channels.channels_of`.
        percentiles: See `intensity.intensity_limits`.

    Attributes:
        shape: (P, H, W) of the planes to predict.
        note: On a choice of channel that may be wrong, and on pixels that are no numbers.
        sample: Plane, rows and columns of the window whose intensities vary most.
    """

    def __init__(
        self,
        recording: Recording,
        plane: str,
        channel: str | None,
        percentiles: tuple[float, float],
    ) -> None:
        # Of each plane to predict, those of which it is the maximum.
        self._places, _ = planes_of(recording, plane)
        self._pixels = recording.pixels
        self._channels, note = channels_of(recording, channel)
        self.shape = (len(self._places), *(int(side) for side in recording.pixels.shape[1:3]))
        try:
            seen = self._look()
            if recording.colour and channel is None:
                self._channels, note = colours_of(seen)
                seen = seen[..., self._channels]
            seen, step = three(seen), sampling_step(self.shape)
            padding = find_padding(seen)
            noise = noise_of(three(self.recorded(*self.sample)[..., self._channels]), padding)
        finally:
            self.close()
        self._limits = limits_of(seen, percentiles, noise, padding, step)
        notes = [note, note_on_holes(self._holes), note_on_contrast(self._limits, seen.dtype)]
        self.note = "; ".join(filter(None, notes))

    def recorded(self, plane: int, rows: slice, columns: slice) -> Array:
        """A window (h, w, C) of all channels."""
        windows = [as_number(self._pixels[place, rows, columns]) for place in self._places[plane]]
        return windows[0] if len(windows) == 1 else np.fmax.reduce(windows)

    def image(self, plane: int, rows: slice, columns: slice) -> Tensor:
        """A window (3, h, w) as the network takes it: normalised by the limits of the whole."""
        pixels = three(self.recorded(plane, rows, columns)[..., self._channels])
        return to_tensor(normalise(pixels, self._limits))

    def __getstate__(self) -> dict[str, Any]:
        # Between processes, a tensor goes through shared memory and an array is copied repeatedly.
        if isinstance(self._pixels, Windows):
            return self.__dict__
        pixels = np.require(self._pixels, requirements=["C", "W"])
        return {**self.__dict__, "_pixels": torch.from_numpy(pixels)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        if not isinstance(self._pixels, Windows):
            self._pixels = state["_pixels"].numpy()

    def close(self) -> None:
        """Close the file for now."""
        if isinstance(self._pixels, Windows):
            self._pixels.close()

    def _look(self) -> Array:
        """Find the sample in one pass over the pixels; gives every n-th of every n-th row."""
        planes, height, width = self.shape
        step = sampling_step(self.shape)
        probe = self.recorded(0, slice(1), slice(1))[..., self._channels]
        shape = (planes, -(-height // step), -(-width // step), probe.shape[-1])
        seen = np.empty(shape, probe.dtype)
        self._holes = 0
        most = -1.0
        for plane, rows, columns in self._windows(step * math.ceil(WINDOW / step)):
            window = self.recorded(plane, rows, columns)[..., self._channels]
            self._holes += int(np.count_nonzero(~np.isfinite(window[..., 0])))
            window = window[::step, ::step]
            top, left = rows.start // step, columns.start // step
            seen[plane, top : top + window.shape[0], left : left + window.shape[1]] = window
            # The border of padding, as beside a mosaic, varies more than nuclei do.
            padding = find_padding(window)
            inside = (
                window[~padding_in(window, padding)] if padding else without_flat_borders(window)
            )
            spread = float(np.nan_to_num(inside.astype(np.float64), posinf=0, neginf=0).std())
            if spread > most:
                most, self.sample = spread, (plane, rows, columns)
        return seen

    def _windows(self, side: int) -> Iterator[tuple[int, slice, slice]]:
        planes, height, width = self.shape
        for plane in range(planes):
            for rows in parts(slice(0, height), side):
                for columns in parts(slice(0, width), side):
                    yield plane, rows, columns
