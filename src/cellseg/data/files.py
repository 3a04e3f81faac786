"""The image files to predict: which there are, and a dataset of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from cellseg.data.about import About
from cellseg.data.digests import digest_of, size_and_time
from cellseg.data.listing import files_to_predict, readable
from cellseg.data.shards import Shard
from cellseg.errors import InputError, counted
from cellseg.reading.channels import to_rgb_planes
from cellseg.reading.images import note_on_maximum, planes_of, read_recording, select_planes
from cellseg.reading.intensity import (
    intensity_limits,
    normalise,
    note_on_contrast,
    note_on_holes,
)
from cellseg.reading.large import LargeImage
from cellseg.reading.recording import LARGE, Recording, unreadable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """How image files are read to predict.

    Attributes:
        percentiles: See `intensity_limits`.
        channel: See `channels.to_rgb_planes`.
        plane: See `images.planes_of`.
        pixel_size: In um, in place of what the file says.
        invert: For the task: whether to predict on the negative, or `auto`.
        diameter: For the task: of the nuclei in px, or `auto` or `none`.
    """

    percentiles: tuple[float, float]
    channel: str | None = None
    plane: str = "all"
    pixel_size: float | None = None
    invert: bool | str = "auto"
    diameter: float | str = "auto"

    def __post_init__(self) -> None:
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise InputError(f"--data.percentiles {low:g},{high:g}: must rise, within 0 to 100")
        if self.plane not in ("all", "max") and not self.plane.isdecimal():
            raise InputError(f"--data.plane {self.plane}: must be a number from 0, max or all")
        if self.pixel_size is not None and not self.pixel_size > 0:
            raise InputError(f"--data.pixel_size {self.pixel_size:g}: must be positive")
        if not isinstance(self.diameter, str) and not self.diameter > 0:
            raise InputError(f"--data.diameter {self.diameter:g}: must be positive, auto or none")


@dataclass(frozen=True)
class Files:
    """What there is to predict.

    Attributes:
        base: Folder that the names are relative to.
        names: All files, sorted.
        own: Those of this run's shard.
        todo: Those of its own that are still to be done, with the stems of their results.
    """

    base: Path
    names: list[str]
    own: list[str]
    todo: list[tuple[str, str]]


@dataclass(frozen=True)
class Search:
    """Where `predict` looks for files: the arguments of `files_to_predict`, and this run's shard.

    The source is None where the command has none.
    """

    source: Path | None
    include: Sequence[str]
    exclude: Sequence[str]
    shard: Shard | None

    def find(self, output: Path | None = None) -> Files:
        """What there is, but for what lies below `output`; all of this run's is to be done.

        Raises:
            InputError: See `files_to_predict`.
        """
        assert self.source is not None  # `application` has seen to it
        base, stems = files_to_predict(self.source, self.include, self.exclude, output)
        own = [name for name in stems if self.shard is None or name in self.shard]
        part = f"; {len(own)} of them in shard {self.shard}" if self.shard else ""
        log.info(f"Data: {counted(len(stems), 'images')} below {base}{part}")
        return Files(base, [*stems], own, [(name, stems[name]) for name in own])


class Held:
    """Hides a value from the loader and from Lightning, which would convert what is in it."""

    def __init__(self, value: Any) -> None:
        self.value = value


class FileDataset(Dataset[dict[str, Any]]):
    """Image files to predict; one that cannot be read is an item with its `error`.

    Items: `file` (relative name), `repeat` (see `samplers.Share`), `error` (empty where all is
    well), and without an error `image` (P, 3, H, W) float32 and `pixels` (P, H, W, C) as recorded,
    `Held`, or a `LargeImage` as `large`; an `About`, `Held`, as `about`; `size`, `mtime` and
    `sha256`.

    Args:
        base: What the names are relative to.
        files: Names and the stems of their results.
        reading: How they are read.
    """

    def __init__(self, base: Path, files: Sequence[tuple[str, str]], reading: Reading) -> None:
        self.base = base
        self.files = files
        self.reading = reading

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: tuple[int, bool]) -> dict[str, Any]:
        index, repeat = place
        name, stem = self.files[index]
        item = {"file": name, "repeat": repeat, "error": ""}
        if repeat:  # it may be huge
            return item | {"error": "done by another process"}
        try:
            return item | self._read(name, stem)
        except InputError as error:
            return item | {"error": str(error)}
        except Exception as error:  # whatever is odd about one file, the others go on
            return item | {"error": str(unreadable(readable(name), error))}

    def _read(self, name: str, stem: str) -> dict[str, Any]:
        path, how = self.base / name, self.reading
        if readable(name) != name:
            raise InputError(f"{readable(name)}: its name is not valid Unicode; rename it")
        size, mtime = size_and_time(path)
        recording = read_recording(path, name, by_windows=True)
        _, wanted = planes_of(recording, how.plane)
        content: dict[str, Any]
        if math.prod(recording.pixels.shape[:3]) > LARGE:
            large = LargeImage(recording, how.plane, how.channel, how.percentiles)
            content, note = {"large": large}, large.note
        else:
            content, note = self._whole(select_planes(recording, how.plane))
        told = wanted if wanted.plane_axes else recording
        about = About(
            file=name,
            stem=stem,
            planes=wanted.planes,
            plane_axes=wanted.plane_axes,
            plane_shape=wanted.plane_shape,
            stack=(told.plane_axes, told.plane_shape),
            channels=recording.channels,
            colour=recording.colour,
            pixel_size=how.pixel_size or recording.pixel_size,
            z_step=recording.z_step,
            note=note,
        ).noted(note_on_maximum(how.plane, recording.plane_axes))
        return content | {
            "about": Held(about),
            "size": size,
            "mtime": mtime,
            "sha256": digest_of(path),
        }

    def _whole(self, recording: Recording) -> tuple[dict[str, Any], str]:
        """The pixels of an item, and a note on them."""
        pixels, note = to_rgb_planes(recording, self.reading.channel)
        limits = intensity_limits(pixels, self.reading.percentiles)
        image = normalise(pixels, limits).transpose(0, 3, 1, 2)
        recorded = np.require(recording.pixels, requirements=["C", "W"])
        content = {
            "image": torch.from_numpy(np.ascontiguousarray(image)),
            "pixels": Held(torch.from_numpy(recorded)),
        }
        holes = int(np.count_nonzero(~np.isfinite(pixels[..., 0])))
        notes = [note, note_on_holes(holes), note_on_contrast(limits, pixels.dtype)]
        return content, "; ".join(filter(None, notes))
