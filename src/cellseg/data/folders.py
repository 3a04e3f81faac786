"""Which image has which masks: the layouts of training folders, and the files to predict."""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from cellseg.data.images import SOFTWARE, SUFFIXES, is_image
from cellseg.errors import InputError

LAYOUTS = (
    "<id>/images/*.png with <id>/masks/*.png, images/ and masks/ with equal names, "
    "or images beside their <name>_labels.tif, <name>_masks.*, <name>_rois.zip or <name>.geojson"
)
# What annotations end with that are no images.
OUTLINES = (".zip", ".roi", ".geojson")
# What names of predicted label images end with: ours, a usual one, Cellpose's.
PREDICTED = ("_labels", "_cp_masks", "_masks")
# What `zipfile` and its decompressors raise for damage, encryption and unknown methods.
DAMAGE = (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Sample:
    """An annotated image, as names in its `Tree`.

    Attributes:
        id: Unique below the root; in the Kaggle layout the image id.
        image: The image's name.
        masks: One mask a nucleus, or a single one that holds them all.
        whole: Whether the single mask holds all nuclei (binary, or a label image).
    """

    id: str
    image: str
    masks: tuple[str, ...]
    whole: bool


@dataclass(frozen=True)
class Shard:
    """One of several independent runs over the same files, each of which does its own.

    Attributes:
        index: Which, from 0.
        count: Of how many.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `I/N`.

        Raises:
            InputError: It is no such text.
        """
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise InputError(
                f"--data.shard {text}: must be I/N with I from 0 to N-1, such as 0/8 to 7/8"
            )
        return cls(int(index), int(count))

    @property
    def name(self) -> str:
        """As part of a file's name."""
        return f"{self.index}of{self.count}"

    def __contains__(self, file: str) -> bool:
        """Whether a file is this one's, by its relative POSIX name alone."""
        digest = hashlib.sha256(file.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.index


class Tree:
    """The files below a folder, by their relative POSIX names."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names = sorted(walk(root))

    def read(self, name: str) -> bytes:
        """The content of one file."""
        return (self.root / name).read_bytes()

    def fingerprint(self, names: Sequence[str]) -> str:
        """A hash of the content of these files, in this order."""
        digest = hashlib.sha256()
        for name in names:
            digest.update(hashlib.sha256(self.read(name)).digest())
        return digest.hexdigest()


class ZipTree(Tree):
    """The files in a zip archive. It is read in place: nothing is ever extracted."""

    def __init__(self, path: Path) -> None:
        self.root = path
        try:
            self._zip = zipfile.ZipFile(path)
        except DAMAGE as error:
            raise InputError(f"{path}: not a readable zip archive ({error})") from error
        self._entries = {e.filename: e for e in self._zip.infolist() if not e.is_dir()}
        for name, entry in self._entries.items():
            # No PNG or TIFF shrinks like this; a decompression bomb does.
            if entry.file_size > 1000 * max(entry.compress_size, 1000):
                raise InputError(f"{path}: {name} claims {entry.file_size:,} bytes; refused")
        self.names = sorted(n for n in self._entries if not n.startswith("__MACOSX/"))

    def read(self, name: str) -> bytes:
        try:
            return self._zip.read(name)
        except DAMAGE as error:
            raise InputError(f"{self.root}: {name} is damaged ({error})") from error

    def fingerprint(self, names: Sequence[str]) -> str:
        """As for a folder, from the stored checksums, so that nothing is decompressed."""
        facts = [(self._entries[name].CRC, self._entries[name].file_size) for name in names]
        return hashlib.sha256(repr(facts).encode()).hexdigest()


def open_tree(root: Path) -> Tree:
    """The files of a data root: a folder, a zip, or a folder that holds just the zip.

    Raises:
        InputError: There is no such folder or archive.
    """
    if root.is_file() and zipfile.is_zipfile(root):
        return ZipTree(root)
    if not root.is_dir():
        raise InputError(f"--data.root {root}: no such folder or zip archive")
    tree = Tree(root)
    archives = [name for name in tree.names if name.lower().endswith(".zip")]
    if len(archives) == 1 and not any(is_image(name) for name in tree.names):
        return ZipTree(root / archives[0])
    return tree


def find_samples(tree: Tree) -> tuple[list[Sample], list[str]]:
    """The annotated images of a tree, sorted by id, and the names of images without a mask.

    Raises:
        InputError: No layout fits, or an image that must have a mask has none.
    """
    folders: dict[PurePosixPath, list[str]] = defaultdict(list)
    for name in tree.names:
        if is_image(name) or name.lower().endswith(OUTLINES):
            folders[PurePosixPath(name).parent].append(name)
    samples: list[Sample] = []
    missing: list[str] = []
    for folder, names in folders.items():
        if folder.name == "masks" and folder.parent / "images" in folders:
            continue
        if folder.name == "images" and any(map(is_image, names)):
            masks = folders.get(folder.parent / "masks", [])
            samples += _paired(folder.parent, list(filter(is_image, names)), masks, missing)
        else:
            samples += _flat(names, missing)
    if not samples:
        raise InputError(f"--data.root {tree.root}: no annotated image found; looked for {LAYOUTS}")
    by_id: dict[str, Sample] = {}
    for sample in samples:
        other = by_id.setdefault(sample.id, sample)
        if other is not sample:
            raise InputError(
                f"{tree.root}: {other.image} and {sample.image} are both '{sample.id}'"
            )
    return [by_id[key] for key in sorted(by_id)], missing


def _paired(
    parent: PurePosixPath, images: list[str], masks: list[str], missing: list[str]
) -> Iterator[Sample]:
    stems = _by_stem(masks)
    own_mask = PurePosixPath(images[0]).stem in stems
    if parent.name and len(images) == 1 and (len(masks) > 1 or (masks and not own_mask)):
        # The Kaggle layout. Only the image's folder is its id, whatever lies above it.
        yield Sample(parent.name, images[0], tuple(masks), whole=False)
        return
    for name in images:
        path = PurePosixPath(name)
        own = stems.get(path.stem, [])
        if len(own) > 1:
            raise InputError(f"{name}: has several masks: {', '.join(own)}")
        if own:
            yield Sample(str(parent / path.stem), name, (own[0],), whole=True)
        else:
            missing.append(name)


def _flat(names: list[str], missing: list[str]) -> Iterator[Sample]:
    stems = _by_stem(names)
    images = [
        name
        for name in names
        if is_image(name)
        and not PurePosixPath(name).stem.endswith((*PREDICTED, "_overlay", "_probs"))
    ]
    for name, identity in zip(images, output_stems(images), strict=True):
        path = PurePosixPath(name)
        # `predict` names its labels after the whole file where two files share a stem.
        own = [
            mask
            for stem in (path.stem, path.name)
            for suffix in (*PREDICTED, "_rois", "")
            for mask in stems.get(stem + suffix, [])
            if suffix or not is_image(mask)
        ]
        if len(own) > 1:
            raise InputError(f"{name}: has several masks: {', '.join(own)}; keep one of them")
        if own:
            yield Sample(identity, name, (own[0],), whole=True)
        else:
            missing.append(name)


def find_predictions(folder: Path, ids: Sequence[str]) -> dict[str, Path]:
    """Sample id to its label image below a folder, for those that have one.

    A label image is named like its image, with one of `PREDICTED` appended or none; the tree
    does not matter where names are unique.

    Raises:
        InputError: There is no such folder, it has none of them, or one has several.
    """
    if not folder.is_dir():
        raise InputError(f"--data.preds_dir {folder}: no such folder")
    found: dict[str, list[str]] = defaultdict(list)
    for name in sorted(walk(folder)):
        path = PurePosixPath(name)
        if is_image(name) and not path.stem.endswith("_overlay"):
            suffix = next(end for end in (*PREDICTED, "") if path.stem.endswith(end))
            stem = path.stem.removesuffix(suffix)
            for key in {stem, str(path.parent / stem)}:
                found[key].append(name)
    chosen = {}
    for sample in ids:
        names = found.get(sample) or found.get(PurePosixPath(sample).name, [])
        # The image itself may lie beside its labels.
        marked = [name for name in names if PurePosixPath(name).stem.endswith(PREDICTED)]
        names = marked or names
        if len(names) > 1:
            raise InputError(f"{folder}: {sample} has several predictions: {', '.join(names)}")
        if names:
            chosen[sample] = folder / names[0]
    if not chosen:
        raise InputError(
            f"--data.preds_dir {folder}: no label image of the images to score, such as "
            f"{PurePosixPath(ids[0]).name}_labels.tif"
        )
    return chosen


def _by_stem(names: list[str]) -> dict[str, list[str]]:
    stems: dict[str, list[str]] = defaultdict(list)
    for name in names:
        stems[PurePosixPath(name).stem].append(name)
    return stems


def walk(root: Path) -> Iterator[str]:
    """Relative POSIX names of all files below a folder, through links, each folder once."""
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        images = [name for name in subfolders if is_zarr(name)]  # each a folder of chunks
        subfolders[:] = sorted(n for n in subfolders if not (n.startswith(".") or is_zarr(n)))
        # A `Path` for each of 100,000 files takes seconds.
        above = "" if folder == str(root) else Path(folder).relative_to(root).as_posix() + "/"
        for name in images + files:
            yield above + name


def files_to_predict(
    source: Path, include: Sequence[str], exclude: Sequence[str], output: Path | None = None
) -> tuple[Path, list[str]]:
    """The images that `predict` tries.

    Args:
        source: A folder (searched with all below it), an image, or a text file that names
            an image a line, absolute or relative to the text file.
        include: Shell patterns for relative paths or names; none means all.
        exclude: The same for what to leave out.
        output: Where results go; what lies below it is not input.

    Returns:
        The folder that all names are relative to, and the sorted POSIX names.

    Raises:
        InputError: There is no such path, or nothing to predict in it.
    """
    if is_zarr(source.name) or (source.is_file() and source.suffix.lower() in SUFFIXES):
        if not source.exists():
            raise InputError(f"--data.predict_dir {source}: no such file or folder")
        base, names = source.parent, [source.name]
    elif source.is_dir():
        base = source
        names = [name for name in walk(source) if is_image(name)]
        if output is not None and source.resolve() in output.resolve().parents:
            folders = {name.rpartition("/")[0] for name in names}
            outside = {f for f in folders if not _is_below(source / f, output)}
            names = [name for name in names if name.rpartition("/")[0] in outside]
    elif source.is_file():
        base, names = _listed(source)
    else:
        raise InputError(f"--data.predict_dir {source}: no such file or folder")
    names = sorted(
        name
        for name in names
        if (not include or _matches(name, include)) and not _matches(name, exclude)
    )
    names = [n for n in names if not (is_named_as_output(n) and is_own_output(base / n))]
    if not names:
        raise InputError(
            f"--data.predict_dir {source}: no image found; looked for {', '.join(SUFFIXES)}"
            + (f", including {', '.join(include)}" if include else "")
            + (f", excluding {', '.join(exclude)}" if exclude else "")
        )
    return base, names


def output_stems(names: Sequence[str]) -> list[str]:
    """What the results of each file are called: its path without the last suffix.

    Files of one folder that share a stem, ignoring case, keep their full names.
    """
    short = [os.path.splitext(name)[0] for name in names]
    taken = Counter(stem.lower() for stem in short) + Counter(name.lower() for name in names)
    return [
        stem if taken[stem.lower()] == 1 else name for stem, name in zip(short, names, strict=True)
    ]


def _is_below(folder: Path, top: Path) -> bool:
    return folder.resolve().is_relative_to(top.resolve())


def _listed(source: Path) -> tuple[Path, list[str]]:
    try:
        lines = source.read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(
            f"--data.predict_dir {source}: neither an image nor a text file with a path a line"
        ) from error
    paths = [os.path.abspath(source.parent / line.strip()) for line in lines if line.strip()]
    if not paths:
        raise InputError(f"--data.predict_dir {source}: the file names no image")
    base = Path(os.path.commonpath([os.path.dirname(path) for path in paths]))
    return base, sorted({Path(path).relative_to(base).as_posix() for path in paths})


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, p) or fnmatch(PurePosixPath(name).name, p) for p in patterns)


def readable(name: str) -> str:
    """A file's name with the bytes written out that are not valid Unicode."""
    return name.encode(errors="backslashreplace").decode()


def is_zarr(name: str) -> bool:
    """Whether a folder's name says that it is an image."""
    return name.lower().endswith(".zarr")


def size_and_time(path: Path | str) -> tuple[int, int]:
    """Bytes of a file, or of all files of a folder, and when the newest was changed, in ns."""
    facts = os.stat(path)
    if not stat.S_ISDIR(facts.st_mode):
        return facts.st_size, facts.st_mtime_ns
    below = [os.stat(Path(folder) / name) for folder, _, names in os.walk(path) for name in names]
    times = [each.st_mtime_ns for each in below]
    return sum(each.st_size for each in below), max(times, default=facts.st_mtime_ns)


def digest_of(path: Path) -> str:
    """The SHA-256 of a file's content, or of that of all files of a folder."""
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()}\0{digest_of(file)}\0".encode())
        return digest.hexdigest()
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def is_named_as_output(name: str) -> bool:
    """Whether a file has the name of a label image, overlay or probabilities."""
    return os.path.splitext(name)[0].endswith(("_labels", "_overlay", "_probs"))


def is_own_output(path: Path) -> bool:
    """Whether a file was written by `predict`, by its software tag."""
    try:
        if path.suffix.lower() in (".tif", ".tiff"):
            import tifffile

            with tifffile.TiffFile(path) as tiff:
                return tiff.pages.first.software.startswith(SOFTWARE)
        from PIL import Image

        with Image.open(path) as picture:
            return str(picture.info.get("Software", "")).startswith(SOFTWARE)
    except Exception:  # damaged, so not ours: it gets its error row as any other file
        return False
