"""Decoded images with merged labels, kept on disk so that each start after the first is quick."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cellseg.atomic import draft_name
from cellseg.data.folders import Sample, Tree
from cellseg.data.masks import read_masks
from cellseg.errors import InputError
from cellseg.reading.channels import three, to_rgb_planes
from cellseg.reading.images import read_one_plane
from cellseg.reading.recording import Array

log = logging.getLogger(__name__)

# Part of every key: raise it when the content of an entry changes its meaning.
FORMAT = "5"


@dataclass(frozen=True)
class CachedImage:
    """A cached image and its labels.

    Attributes:
        id: The sample's id.
        folder: The cache entry.
    """

    id: str
    folder: Path

    def image(self) -> Array:
        """(H, W, 3), mapped from disk."""
        return np.asarray(np.load(self.folder / "image.npy", mmap_mode="r"))

    def labels(self) -> Array:
        """(H, W) uint16 or int32, 0 is the background, mapped from disk."""
        return np.asarray(np.load(self.folder / "labels.npy", mmap_mode="r"))

    def digest(self) -> str:
        """A hash of the recorded pixels: the same image whatever its name, format or channel."""
        return (self.folder / "digest.txt").read_text()


def pixel_digest(image: Array) -> str:
    """Sixteen hex digits that tell one image from another by its pixels."""
    head = f"{image.shape} {image.dtype}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(image).tobytes()).hexdigest()[:16]


def default_cache_dir() -> Path:
    """The user's cache folder for this program."""
    from platformdirs import user_cache_path

    return user_cache_path("cellseg")


def prepare(
    tree: Tree, samples: Sequence[Sample], cache_dir: Path, channel: str | None = None
) -> list[CachedImage]:
    """Cache entries for all samples, made where they are missing, with a progress bar.

    `channel` is that of the images which shows the nuclei, see `channels.to_rgb_planes`.

    An entry is keyed by the content of its files and appears by a rename, so an interrupted
    or a simultaneous run does no harm, and the folder may be deleted between runs.

    Raises:
        InputError: A file is damaged, or a mask does not fit its image.
    """
    annotated, todo = [], []
    for sample in samples:
        content = tree.fingerprint((sample.image, *sample.masks))
        facts = f"{FORMAT} {channel} {sample.whole} {content}"
        key = hashlib.sha256(facts.encode()).hexdigest()[:32]
        entry = CachedImage(sample.id, cache_dir / key[:2] / key)
        annotated.append(entry)
        if not entry.folder.is_dir():
            todo.append((sample, entry))
    if todo:
        from tqdm import tqdm

        for sample, entry in tqdm(todo, desc="Merging masks", unit="image", leave=False):
            _write(entry.folder, *read_sample(tree, sample, channel))
    return annotated


def read_sample(tree: Tree, sample: Sample, channel: str | None = None) -> tuple[Array, Array, str]:
    """An image, its labels and its digest, read from files: (H, W, 3), (H, W) and hex digits."""
    recording = read_one_plane(tree.source(sample.image), sample.image)
    image, recorded = to_rgb_planes(recording, channel)[0][0], recording.pixels[0]
    if recorded.dtype.kind == "f" and not np.isfinite(recorded).all():
        damaged = np.count_nonzero(~np.isfinite(recorded))
        if damaged == recorded.size:
            raise InputError(f"{sample.image}: no pixel is a number; leave it out")
        log.warning(f"{sample.image}: {damaged} pixels are NaN or infinite and count as 0")
    digest = pixel_digest(three(recorded) if recorded.shape[2] == 1 else recorded)
    return image, read_masks(tree, sample, image.shape[:2]), digest


def _write(folder: Path, image: Array, labels: Array, digest: str) -> None:
    draft = folder.with_name(f"{draft_name()}-{folder.name}")
    try:
        draft.mkdir(parents=True)
        np.save(draft / "image.npy", np.ascontiguousarray(image))
        np.save(draft / "labels.npy", labels)
        (draft / "digest.txt").write_text(digest)
        os.replace(draft, folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was first
            raise InputError(
                f"{folder}: {error.strerror or error}; name a writable folder with --data.cache_dir"
            ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
