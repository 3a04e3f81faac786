"""What is known of an image file besides its pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class About:
    """What is known of an image besides its pixels.

    Attributes:
        file: Relative POSIX name.
        stem: What its results are called.
        planes: Index of each plane in the file; empty for a file of one plane.
        axes: What the planes are, such as "TZ", with as many numbers of them in `shape`.
        shape: Of the planes; their product is P.
        stack: `axes` and `shape` of the file, of which not all planes may be wanted.
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
    axes: str
    shape: tuple[int, ...]
    stack: tuple[str, tuple[int, ...]]
    channels: Sequence[str]
    colour: bool
    pixel_size: float | None
    z_step: float | None
    note: str = ""
    scale: float = 1.0

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
