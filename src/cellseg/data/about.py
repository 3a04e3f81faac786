"""What the results of an image say of its file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class About:
    """What is known of an image besides its pixels.

    Attributes:
        file: Relative POSIX name.
        stem: What its results are called.
        planes: The planes to predict, and with `plane_axes` and `plane_shape` what they are: as
            of `Recording`, but without those that are not wanted.
        stack: `plane_axes` and `plane_shape` of the whole file.
        channels: Names of the C channels.
        colour: Whether they are red, green and blue of one picture.
        pixel_size: In um, or None.
        z_step: Distance of two planes of Z in um, or None.
        note: For the summary.
        scale: Factor by which the image was enlarged for the network.
    """

    file: str
    stem: str
    planes: Sequence[int]
    plane_axes: str
    plane_shape: tuple[int, ...]
    stack: tuple[str, tuple[int, ...]]
    channels: Sequence[str]
    colour: bool
    pixel_size: float | None
    z_step: float | None
    note: str = ""
    scale: float = 1.0

    def noted(self, note: str) -> About:
        """The same with another note, if there is any."""
        return replace(self, note="; ".join(filter(None, [self.note, note])))

    @property
    def plane_names(self) -> list[str]:
        """What the tables call the planes."""
        return [str(plane) for plane in self.planes] or [""]

    @property
    def positions(self) -> list[tuple[int, int]]:
        """Where each of `planes` lies, in z and in time; axes of other names count as z."""
        axes, shape = self.stack
        if axes not in ("T", "TZ", "ZT"):
            return [(plane, 0) for plane in self.planes]
        numbers = (np.unravel_index(plane, shape) for plane in self.planes)
        places = [dict(zip(axes, map(int, each), strict=True)) for each in numbers]
        return [(place.get("Z", 0), place["T"]) for place in places]

    @property
    def is_hyperstack(self) -> bool:
        """Whether ImageJ counts the images of the file by more than one number."""
        return len(self.stack[0]) > 1 or (len(self.channels) > 1 and not self.colour)
