"""Which image has which masks: the layouts of training folders."""

from __future__ import annotations

import hashlib
import stat
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from cellseg.data.digests import digest_of
from cellseg.data.listing import MASKS, PREDICTED, folder_of, nfc, output_stems, stem_of, walk
from cellseg.errors import DAMAGE, InputError, counted, few
from cellseg.reading.images import is_image
from cellseg.reading.recording import unreadable

LAYOUTS = (
    "<id>/images/*.png with <id>/masks/*.png, images/ and masks/ or labels/ with equal names, "
    "or images beside their <name>_labels.tif, <name>_masks.*, <name>_rois.zip or <name>.geojson"
)
# What Fiji calls the outlines of any image.
ROI_SET = "RoiSet"
# What annotations end with that are no images.
OUTLINE_FILES = (".zip", ".roi", ".geojson")


@dataclass(frozen=True)
class Sample:
    """An annotated image, as names in its `Tree`.

    Attributes:
        id: Unique below the root, in NFC; in the Kaggle layout the image id.
        image: The image's name.
        masks: One mask a nucleus, or a single one that holds them all.
        whole: Whether the single mask holds all nuclei (binary, or a label image).
    """

    id: str
    image: str
    masks: tuple[str, ...]
    whole: bool


class Tree:
    """The files below a folder, by their relative POSIX names."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names = sorted(walk(root))

    def source(self, name: str) -> Path | bytes:
        """Where the content of one file is, or the content itself."""
        return self.root / name

    def fingerprint(self, names: Sequence[str]) -> str:
        """A hash of the content of these files, in this order."""
        digest = hashlib.sha256()
        for name in names:
            try:
                digest.update(bytes.fromhex(digest_of(self.root / name)))
            except OSError as error:
                raise unreadable(str(self.root / name), error) from error
        return digest.hexdigest()


class ZipTree(Tree):
    """The files in a zip archive. It is read in place: nothing is ever extracted."""

    def __init__(self, path: Path) -> None:
        self.root = path
        try:
            self._zip = zipfile.ZipFile(path)
        except DAMAGE as error:
            raise InputError(f"{path}: not a zip archive, or a broken-off one ({error})") from error
        # Windows PowerShell writes backslashes, which Python takes for slashes on Windows alone.
        entries = {entry.filename.replace("\\", "/"): entry for entry in self._zip.infolist()}
        self._entries = {name: entry for name, entry in entries.items() if name[-1:] != "/"}
        for name, entry in self._entries.items():
            is_link = stat.S_ISLNK(entry.external_attr >> 16)
            if is_link or name.startswith("/") or ".." in name.split("/"):
                raise InputError(f"{path}: {name} leads out of the archive; refused")
            # No PNG or TIFF shrinks like this; a decompression bomb does.
            if entry.file_size > 1000 * max(entry.compress_size, 1000):
                raise InputError(f"{path}: {name} claims {entry.file_size:,} bytes; refused")
        self.names = sorted(n for n in self._entries if not n.startswith("__MACOSX/"))

    def source(self, name: str) -> bytes:
        try:
            return self._zip.read(self._entries[name])
        except DAMAGE as error:
            raise InputError(f"{self.root}: {name} is damaged ({error})") from error

    def fingerprint(self, names: Sequence[str]) -> str:
        """As for a folder, from the stored checksums, so that nothing is decompressed."""
        facts = [(self._entries[name].CRC, self._entries[name].file_size) for name in names]
        return hashlib.sha256(repr(facts).encode()).hexdigest()


def open_tree(root: Path, flag: str = "--data.root") -> Tree:
    """The files of a data root: a folder, a zip, or a folder that holds just the zip.

    Args:
        root: The folder or zip.
        flag: What named it.

    Raises:
        InputError: There is no such folder or archive.
    """
    if root.is_file():
        return ZipTree(root)
    if not root.is_dir():
        raise InputError(f"{flag} {root}: no such folder or zip archive")
    tree = Tree(root)
    archives = [name for name in tree.names if name.lower().endswith(".zip")]
    if len(archives) == 1 and not any(is_image(name) for name in tree.names):
        return ZipTree(root / archives[0])
    return tree


def find_samples(tree: Tree) -> tuple[list[Sample], list[str], list[str]]:
    """The annotated images of a tree, sorted by id; images without a mask, masks without an image.

    Raises:
        InputError: No layout fits, or two images have one id or one mask.
    """
    folders: dict[PurePosixPath, list[str]] = defaultdict(list)
    for name in tree.names:
        if is_image(name) or name.lower().endswith(OUTLINE_FILES):
            folders[PurePosixPath(folder_of(name))].append(name)
    images: list[Sample] = []
    for folder, names in folders.items():
        if folder.name in MASKS and folder.parent / "images" in folders:
            continue
        masks = [mask for name in MASKS for mask in folders.get(folder.parent / name, [])]
        if folder.name == "images" and masks and any(map(is_image, names)):
            images += _paired(folder.parent, list(filter(is_image, names)), masks)
        else:
            images += _flat(names)
    samples = [replace(image, id=nfc(image.id)) for image in images if image.masks]
    missing = [image.image for image in images if not image.masks]
    used = {mask for sample in samples for mask in sample.masks}
    every = {name for names in folders.values() for name in names if _is_mask(name)}
    unused = sorted(every - used - {image.image for image in images})
    if not samples:
        seen = [
            f"{counted(len(names), what)} such as {names[0]}"
            for what, names in (("images", missing), ("masks", unused))
            if names
        ]
        among = f" among {' and '.join(seen)}" if seen else ""
        raise InputError(
            f"{tree.root}: no annotated image found{among}; looked for {LAYOUTS}"
            + only_in_cellpose(tree, missing)
        )
    by_id: dict[str, Sample] = {}
    image_of: dict[str, str] = {}
    for sample in samples:
        for mask in sample.masks:
            if (image := image_of.setdefault(mask, sample.image)) != sample.image:
                raise InputError(
                    f"{tree.root}: {mask} would be of {image} and of {sample.image}; keep one of "
                    "the images, or call a mask after each whole name"
                )
        other = by_id.setdefault(sample.id, sample)
        if other is not sample:
            raise InputError(
                f"{tree.root}: {other.image} and {sample.image} are both '{sample.id}'"
            )
    return [by_id[key] for key in sorted(by_id)], missing, unused


def only_in_cellpose(tree: Tree, missing: Sequence[str]) -> str:
    """What to do where images have masks only as Cellpose keeps them; else empty.

    Such a file is a pickle: to read one may run a program that is in it.
    """
    kept = {str(PurePosixPath(name).with_suffix("")) + "_seg.npy" for name in missing}
    found = few(sorted(kept.intersection(tree.names)))
    return found and f"; not read: {found}, save the masks as PNG or TIFF in Cellpose"


def _is_mask(name: str) -> bool:
    stem = stem_of(name)
    return (
        PurePosixPath(folder_of(name)).name in MASKS
        or stem.endswith((*PREDICTED, "_rois"))
        or stem == ROI_SET
    )


class ByStem:
    """Files by their name without its suffix, in NFC, and by that without `.ome`."""

    def __init__(self, names: Sequence[str]) -> None:
        self.exact: dict[str, list[str]] = defaultdict(list)
        self.bare: dict[str, list[str]] = defaultdict(list)
        for name in names:
            self.exact[nfc(PurePosixPath(name).stem)].append(name)
            self.bare[stem_of(name)].append(name)


def _paired(parent: PurePosixPath, images: list[str], masks: list[str]) -> Iterator[Sample]:
    """Images with the masks of the folder beside theirs, perhaps with none."""
    of_stem = ByStem(masks)
    own = {name: _masks_of(name, of_stem) for name in images}
    if parent.name and len(images) == 1 and not own[images[0]]:
        # The Kaggle layout. Only the image's folder is its id, whatever lies above it.
        yield Sample(parent.name, images[0], tuple(masks), whole=False)
        return
    for name in images:
        yield Sample(str(parent / PurePosixPath(name).stem), name, own[name], whole=True)


def _flat(names: list[str]) -> Iterator[Sample]:
    """Images with the masks of their own folder, perhaps with none."""
    of_stem = ByStem(names)
    ends = (*PREDICTED, "_overlay", "_probs")
    images = [name for name in names if is_image(name) and not stem_of(name).endswith(ends)]
    for name, identity in output_stems(images).items():
        masks = _masks_of(name, of_stem)
        if len(images) == 1:
            masks = masks or tuple(mask for mask in of_stem.exact[ROI_SET] if mask != name)
        yield Sample(identity, name, masks, whole=True)


def _masks_of(name: str, masks: ByStem) -> tuple[str, ...]:
    """The mask of an image, if it has one."""
    path = PurePosixPath(name)
    # `predict` names its labels after the whole file where two files share a stem.
    whole = {nfc(path.name), nfc(path.stem)}
    for table, stems in ((masks.exact, whole), (masks.bare, {stem_of(name)})):
        own = [
            mask
            for stem in sorted(stems)
            for mark in ("", *PREDICTED, "_rois")
            for mask in table.get(stem + mark, [])
            if mark or not is_image(mask) or PurePosixPath(mask).parent != path.parent
        ]
        if len(own) > 1:
            raise InputError(f"{name}: has several masks: {', '.join(own)}; keep one of them")
        if own:
            return tuple(own)
    return ()
