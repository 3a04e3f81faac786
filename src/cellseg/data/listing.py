"""The files below a folder, and which of them are images to predict."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path, PurePosixPath

from cellseg.errors import InputError, few
from cellseg.reading.images import SUFFIXES, UNREAD, is_image

log = logging.getLogger(__name__)

# How the names of results end that are images themselves.
RESULTS = ("_labels.tif", "_overlay.png", "_probs.tif")
# And the stems of label images: ours, Cellpose's, usual ones.
PREDICTED = ("_labels", "_label", "-labels", "_cp_masks", "_masks", "_mask", "_seg")
# What a folder of masks is called, beside the folder `images`.
MASKS = ("masks", "labels")
# How the program's name in our TIFFs and PNGs begins, so that none is taken for an image.
OWN_TAG = "cellseg"
# How microscopes name the channels of an image that they save as files of their own.
CHANNEL = re.compile(r"_(w|ch|c)\d{1,2}(?=[_.][^/]*$)", re.IGNORECASE)
# Bytes of a list of images.
LONGEST_LIST = 2**28


def walk(root: Path, unlisted: list[str] | None = None) -> Iterator[str]:
    """Relative POSIX names of all files below a folder, each once; links come after all else.

    Args:
        root: The folder.
        unlisted: Takes the names of folders below it that cannot be listed.
    """

    def leave_out(error: OSError) -> None:
        log.warning(f"{error.filename}: left out, cannot be listed: {error.strerror}")
        if unlisted is not None and error.filename != str(root):
            unlisted.append(Path(error.filename).relative_to(root).as_posix())

    seen = set()
    tops = [str(root)]
    while tops:
        links = []
        walks = (os.walk(top, onerror=leave_out) for top in tops)
        for folder, subfolders, files in chain.from_iterable(walks):
            real = os.path.realpath(folder)
            if real in seen:
                subfolders.clear()
                continue
            seen.add(real)
            images = [name for name in subfolders if is_zarr(name)]  # each a folder of chunks
            subfolders[:] = sorted(n for n in subfolders if not (n.startswith(".") or is_zarr(n)))
            inner = (os.path.join(folder, name) for name in subfolders)
            links += [path for path in inner if os.path.islink(path)]  # not walked into
            # A `Path` for each of 100,000 files takes seconds.
            above = "" if folder == str(root) else Path(folder).relative_to(root).as_posix() + "/"
            for name in images + files:
                if not name.startswith("._"):  # macOS keeps such twins on other systems' disks
                    yield above + name
        tops = links


def files_to_predict(
    source: Path, include: Sequence[str], exclude: Sequence[str], output: Path | None = None
) -> tuple[Path, dict[str, str]]:
    """The images that `predict` tries.

    Args:
        source: A folder (searched with all below it), an image, or a text file that names
            an image a line, absolute or relative to the text file.
        include: Shell patterns for relative paths or names; none means all.
        exclude: The same for what to leave out.
        output: Where results go; what lies below it is not input.

    Returns:
        The folder that all names are relative to, and the POSIX names, sorted, each with its
        stem of `output_stems` among all files, whichever of them are tried.

    Raises:
        InputError: There is no such path, or nothing to predict in it.
    """
    try:
        source.stat()
    except FileNotFoundError as error:
        raise InputError(f"--data.predict_dir {source}: no such file or folder") from error
    except OSError as error:
        raise InputError(f"--data.predict_dir {source}: {error.strerror}") from error
    if is_zarr(source.name) or (source.is_file() and source.suffix.lower() in SUFFIXES):
        base, names = source.parent, [source.name]
    elif source.is_dir():
        base = source
        unlisted: list[str] = []
        files = [*walk(source, unlisted)]
        names = [name for name in files if is_image(name)]
        if unread := sorted(name for name in files if name.lower().endswith(UNREAD)):
            log.info(f"{len(unread)} left out, of kinds that are not read: {few(unread)}")
        if output is not None and source.resolve() in output.resolve().parents:
            folders = {name.rpartition("/")[0] for name in names}
            outside = {f for f in folders if not _is_below(source / f, output)}
            names = [name for name in names if name.rpartition("/")[0] in outside]
        # A folder that cannot be listed gets an error row: its images are not done.
        names = [*_without_results(source, names), *unlisted]
    elif source.is_file():
        base, names = _listed(source)
    else:  # a pipe would be waited for
        raise InputError(f"--data.predict_dir {source}: neither a file nor a folder")
    stems = output_stems(names)
    names = sorted(
        name
        for name in names
        if (not include or _matches(name, include)) and not _matches(name, exclude)
    )
    names = [n for n in names if not (n.endswith(RESULTS) and is_own_output(base / n))]
    _tell_of_channels(names)
    if not names:
        raise InputError(
            f"--data.predict_dir {source}: no image found; looked for {', '.join(SUFFIXES)}"
            + (f", including {', '.join(include)}" if include else "")
            + (f", excluding {', '.join(exclude)}" if exclude else "")
        )
    return base, {name: stems[name] for name in names}


def _tell_of_channels(names: Sequence[str]) -> None:
    """Say where images seem to be channels of others: each is searched for nuclei."""
    marks: dict[str, set[str]] = defaultdict(set)
    for name in names:
        if mark := CHANNEL.search(name):
            marks[(name[: mark.start()] + name[mark.end() :]).lower()].add(mark[0])
    several = [found for found in marks.values() if len(found) > 1]
    if several:
        seen = sorted(set.union(*several))
        log.info(
            f"Names differ by {few(seen)} alone, as of channels in files of their own; nuclei are "
            f"looked for in each: --data.include '*{seen[0]}*' takes one"
        )


def _without_results(base: Path, names: Sequence[str]) -> list[str]:
    """Images of a folder without those that are results or masks of others, by their names.

    Corrected labels have lost the tag that tells of their origin.
    """
    stems = {name: nfc(os.path.splitext(name)[0].removesuffix(".ome")) for name in names}
    known = {*map(nfc, names), *stems.values(), *(nfc(os.path.splitext(n)[0]) for n in names)}
    folders = {folder_of(name) for name in names}

    def belongs(name: str) -> bool:
        ends = [end for end in RESULTS if name.endswith(end)]
        if any(nfc(name).removesuffix(end) in known for end in ends):
            return True
        marks = [mark for mark in PREDICTED if stems[name].endswith(mark)]
        if any(stems[name].removesuffix(mark) in known for mark in marks):
            return True
        above, slash, own = folder_of(name).rpartition("/")
        return own in MASKS and f"{above}{slash}images" in folders

    others = {name for name in names if belongs(name)}
    foreign = [name for name in sorted(others) if not is_own_output(base / name)]
    if foreign:
        log.info(
            f"{len(foreign)} left out as results or masks of images beside them: {few(foreign)}"
        )
    return [name for name in names if name not in others]


def output_stems(names: Sequence[str]) -> dict[str, str]:
    """What the results of each file are called: its path without the last suffix.

    Files of one folder that share a stem, ignoring case, keep their full names.
    """
    short = {name: os.path.splitext(name)[0] for name in names}
    taken = Counter(nfc(each).lower() for each in (*short, *short.values()))
    return {name: stem if taken[nfc(stem).lower()] == 1 else name for name, stem in short.items()}


def folder_of(name: str) -> str:
    """The folder of a file; one called Images, Masks or Labels in small letters."""
    folder = name.rpartition("/")[0]
    above, slash, own = folder.rpartition("/")
    return f"{above}{slash}{own.lower()}" if own.lower() in ("images", *MASKS) else folder


def nfc(name: str) -> str:
    """A name as names are compared: in a zip of a Mac the accents are characters of their own."""
    return unicodedata.normalize("NFC", name)


def stem_of(name: str) -> str:
    """The last part of a path without its suffix, also without `.ome.tif`, in NFC."""
    return nfc(PurePosixPath(name).stem).removesuffix(".ome")


def _is_below(folder: Path, top: Path) -> bool:
    return folder.resolve().is_relative_to(top.resolve())


def _listed(source: Path) -> tuple[Path, list[str]]:
    try:
        if source.stat().st_size > LONGEST_LIST:
            raise ValueError("not read: it may be a slide")
        lines = source.read_text(encoding="utf-8-sig").splitlines()
    except (ValueError, OSError) as error:
        raise InputError(
            f"--data.predict_dir {source}: neither an image that is read ({', '.join(SUFFIXES)}) "
            "nor a text file with a path a line"
        ) from error
    named = [line.strip().strip("\"'") for line in lines]  # Windows copies paths in quotes
    # A line that begins with # is a comment, unless there is such a file.
    told = [n for n in named if n and (n[0] != "#" or os.path.exists(source.parent / n))]
    paths = [os.path.abspath(source.parent / name) for name in told]
    if not paths:
        raise InputError(f"--data.predict_dir {source}: the file names no image")
    try:
        base = Path(os.path.commonpath([os.path.dirname(path) for path in paths]))
    except ValueError as error:  # on Windows
        raise InputError(
            f"--data.predict_dir {source}: names images on several drives; make a list of each"
        ) from error
    return base, sorted({Path(path).relative_to(base).as_posix() for path in paths})


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a path or its last part is like one of the patterns, in whatever case."""
    lower = nfc(name).lower()
    each = (nfc(pattern).lower() for pattern in patterns)
    return any(fnmatch(lower, p) or fnmatch(PurePosixPath(lower).name, p) for p in each)


def readable(name: str) -> str:
    """A file's name with the bytes written out that are not valid Unicode."""
    return name.encode(errors="backslashreplace").decode()


def is_zarr(name: str) -> bool:
    """Whether a folder's name says that it is an image."""
    return name.lower().endswith(".zarr")


def is_own_output(path: Path) -> bool:
    """Whether a file was written by `predict`, by its software tag."""
    try:
        return _software(path).startswith(OWN_TAG)
    except Exception:  # damaged, so not ours: it gets its error row as any other file
        return False


def _software(path: Path) -> str:
    """The program that has written a file, where that says so."""
    suffix = path.suffix.lower()
    if suffix in (".tif", ".tiff"):
        import tifffile

        with tifffile.TiffFile(path) as tiff:
            return str(tiff.pages.first.software)
    if suffix == ".png":
        from PIL import Image

        with Image.open(path) as picture:
            return str(picture.info.get("Software", ""))
    return ""
