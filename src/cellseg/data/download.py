"""The 2018 Data Science Bowl training images, from their public home."""

from __future__ import annotations

import os
import zipfile
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from cellseg.data.digests import digest_of
from cellseg.data.folders import ZipTree, find_samples, open_tree
from cellseg.data.groups import dsb2018
from cellseg.errors import DAMAGE, InputError

URL = "https://data.broadinstitute.org/bbbc/BBBC038/stage1_train.zip"
NAME = "stage1_train.zip"

_BY_HAND = "download it by hand and give it as --data.root"
_ANEW = "delete it and run again"


def is_wanted(root: Path) -> bool:
    """Whether a root has no annotated image but those of the archive, which is held to be whole."""
    if (root / NAME).exists():
        return True
    try:
        return not find_samples(open_tree(root))[0]
    except InputError:
        return True


def fetch(folder: Path, url: str = URL) -> Path:
    """The archive in `folder` (created when missing), downloaded when it is not there yet.

    No checksum is published, so the first good archive sets it: its SHA-256 is kept beside
    it, and each later call holds the archive against that.

    Args:
        folder: Where the archive and its `.sha256` file are.
        url: Where the archive comes from.

    Returns:
        The archive's path.

    Raises:
        InputError: It cannot be downloaded or stored, or is not what it should be.
    """
    path = folder / NAME
    note = folder / f"{NAME}.sha256"
    try:
        present = path.exists()
        if present and note.exists():
            if note.read_bytes().split()[:1] != [digest_of(path).encode()]:
                raise InputError(f"{path}: damaged or changed, as {note.name} shows; {_ANEW}")
            return path
        folder.mkdir(parents=True, exist_ok=True)
        # Drafts have a folder of their own beside the archive: it goes with all that is in it.
        with TemporaryDirectory(dir=folder, prefix=".draft-") as drafts:
            if present:
                archive, source, way_out = path, str(path), _ANEW
            else:
                archive, source, way_out = Path(drafts, NAME), url, _BY_HAND
                _download(url, archive)
            if flaw := _flaw(archive):
                raise InputError(f"{source}: {flaw}; {way_out}")
            draft = Path(drafts, note.name)
            draft.write_text(f"{digest_of(archive)}  {NAME}\n", encoding="utf-8")
            # The note first: alone it does no harm, but an older one would condemn the archive.
            os.replace(draft, note)
            if not present:
                os.replace(archive, path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read or written ({error.strerror}); {_BY_HAND}"
        ) from error
    return path


def _download(url: str, target: Path) -> None:
    from pooch import HTTPDownloader
    from requests import RequestException
    from tqdm import tqdm

    # A compressed transfer would have another length than the file.
    headers = {"Accept-Encoding": "identity"}
    # Pooch sets the real total, but tests the bar's truth before, which needs one.
    bar = tqdm(total=1, desc=f"Downloading {NAME}", unit="B", unit_scale=True, leave=False)
    with bar:
        download = HTTPDownloader(progressbar=bar, chunk_size=1 << 16, headers=headers)
        try:
            download(url, target, None)
        except RequestException as error:
            cause: BaseException = error
            while cause.__context__:  # the innermost is the one that says what happened
                cause = cause.__context__
            raise InputError(f"{url}: no download ({cause}); {_BY_HAND}") from error
    # The total is now the Content-Length; urllib3 1 does not compare it with what came.
    size = target.stat().st_size
    if bar.total and size != bar.total:
        raise InputError(f"{url}: broke off after {size:,} of {bar.total:,} bytes; {_BY_HAND}")


def _flaw(archive: Path) -> str:
    """What is wrong with an archive; empty when nothing is."""
    try:
        tree = ZipTree(archive)
        with zipfile.ZipFile(archive) as members:
            if damaged := members.testzip():
                return f"{damaged} in it is damaged"
    except InputError as error:
        return str(error).removeprefix(f"{archive}: ")  # a draft's name means nothing to people
    except DAMAGE as error:
        return f"a damaged zip archive ({error!r})"
    ids: set[str] = set()
    with suppress(InputError):
        ids = {sample.id for sample in find_samples(tree)[0]}
    known = ids & dsb2018().keys()
    if len(known) > len(dsb2018()) / 2:
        return ""
    return f"holds {len(known)} of the {len(dsb2018())} images of the 2018 Data Science Bowl"
