"""How the files of an image take their names: together, and never over a person's work."""

from __future__ import annotations

import json
import logging
import os
import zipfile
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Self

from cellseg import __version__
from cellseg.atomic import DRAFT, draft_name, writing
from cellseg.data.digests import digest_of
from cellseg.data.listing import OWN_TAG, is_own_output
from cellseg.errors import InputError

log = logging.getLogger(__name__)

# The tag of results that have a place for one, see `listing.is_own_output`.
SOFTWARE = f"{OWN_TAG} {__version__}"
# What a results folder holds besides results.
FOLDER = ".cellseg"


class Drafts:
    """The files of one image: written aside, then moved to their places one after the other.

    As a context manager it leaves nothing behind that did not get there.

    Args:
        dir: The results folder.
        stem: What the files are called, without their endings.

    Attributes:
        written: Draft and digest of each file, by its name relative to the results folder.
    """

    def __init__(self, dir: Path, stem: str) -> None:
        self.dir = dir
        self.stem = stem
        self.written: dict[str, tuple[Path, str]] = {}
        self._begun = 0
        # Under no name that looks like a result, and in no folder that comes and goes.
        self._common = draft_name()

    @contextmanager
    def draft(self, ending: str) -> Iterator[Path]:
        """A temporary file for the result whose name ends in this; errors as of `atomic.draft`."""
        path = self.dir / f"{self.stem}{ending}"
        self._begun += 1  # several may be open at a time
        name = self.dir / FOLDER / f"{self._common}.{self._begun}{path.suffix}"
        with writing(path):
            with suppress(FileNotFoundError):
                path.lstat()  # else what is wrong with its name would be known too late
            name.parent.mkdir(parents=True, exist_ok=True)
            yield name
            self.written[f"{self.stem}{ending}"] = name, digest_of(name)

    @property
    def digests(self) -> dict[str, str]:
        """Of what was written, by name."""
        return {name: digest for name, (_, digest) in self.written.items()}

    def move(self, known: Mapping[str, Collection[str]]) -> None:
        """Move all files to their places.

        Args:
            known: Digests of what was written there before, see `make_way`.
        """
        for name, (draft, _) in self.written.items():
            path = self.dir / name
            make_way(path, known.get(name, ()))
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(draft, path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for left in (self.dir / FOLDER).glob(f"{self._common}.*"):
            with suppress(OSError):
                left.unlink()


def make_way(path: Path, digests: Collection[str]) -> None:
    """Rename what another result is about to replace, unless it is as it was written here.

    Args:
        path: Where the result goes.
        digests: Of what was written there; none where that is not known and its tag has to tell.
    """
    if not os.path.isfile(path):
        return
    # What was written here and is damaged since is nothing that a person made.
    if digests and (digest_of(path) in digests or not is_whole(path)):
        return
    if not digests and is_own_output(path):
        return
    # With this suffix no run takes it for an image.
    names = (path.with_name(f"{path.name}.edited{n or ''}") for n in count())
    try:
        aside = next(free for free in names if not free.exists())
        path.rename(aside)
    except OSError as error:  # of this file alone
        raise InputError(f"{path}: cannot be renamed: {error.strerror or error}") from error
    log.warning("%s is not as it was written here: kept as %s", path, aside.name)


def sweep(dir: Path, before: float) -> None:
    """Delete the drafts that killed processes have left in a results folder.

    Args:
        dir: The results folder.
        before: Drafts that were changed since this time may still be written.
    """
    for path in (*dir.glob(".draft-*"), *(dir / FOLDER).glob(".draft-*")):
        with suppress(OSError):
            if DRAFT.fullmatch(path.name) and path.stat().st_mtime < before:
                path.unlink()


def is_whole(path: Path) -> bool:
    """Whether a result of an image can be read to its end; all but JSON have checksums."""
    try:
        if path.suffix == ".tif":
            import tifffile

            with tifffile.TiffFile(path) as tiff:
                for page in (page.aspage() for page in tiff.pages):
                    # One after the other, since it may be huge. Without compression there is
                    # nothing to see but the size.
                    if page.compression != tifffile.COMPRESSION.NONE:
                        deque(page.segments(), maxlen=0)
        elif path.suffix == ".png":
            from PIL import Image

            with Image.open(path) as picture:
                picture.verify()
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
        elif path.suffix in (".json", ".geojson"):
            json.loads(path.read_bytes())
    except Exception:  # each format has its own errors for damage
        return False
    return True
