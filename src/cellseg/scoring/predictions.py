"""Label images to score, whoever made them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from cellseg.data.listing import PREDICTED, nfc, stem_of, walk
from cellseg.errors import InputError
from cellseg.reading.images import is_image


def find_predictions(folder: Path, ids: Sequence[str]) -> dict[str, Path]:
    """Sample id to its label image below a folder, for those that have one.

    A label image is named like its image, with one of `PREDICTED` appended or none; the tree
    does not matter where names are unique.

    Raises:
        InputError: There is no such folder, it has none of them, or one has several.
    """
    if not folder.is_dir():
        raise InputError(f"--data.preds_dir {folder}: no such folder")
    found: dict[str, list[str]] = defaultdict(list)  # by their paths
    bare: dict[str, list[str]] = defaultdict(list)
    for name in sorted(walk(folder)):
        path = PurePosixPath(nfc(name))
        if is_image(name):
            suffix = next(end for end in (*PREDICTED, "") if stem_of(name).endswith(end))
            stem = stem_of(name).removesuffix(suffix).removesuffix(".ome")
            bare[stem].append(name)
            keys = {str(path.parent / stem)}
            # Which ids leave out; that of a lone image is the folder.
            if path.parent.name.lower() == "images":
                above = path.parent.parent
                keys |= {str(above / stem), above.name}
            for key in keys:
                found[key].append(name)
    chosen = {}
    stems = {sample: sample.removesuffix(".ome") for sample in ids}
    same_name = Counter(PurePosixPath(stem).name for stem in stems.values())
    named = {}
    for sample, stem in stems.items():
        last = PurePosixPath(stem).name
        named[sample] = [found.get(stem, []), bare.get(last, []) if same_name[last] == 1 else []]
    if any(_is_marked(name) for both in named.values() for names in both for name in names):
        # The images themselves may lie beside their labels, and beside those of others.
        named = {k: [list(filter(_is_marked, names)) for names in v] for k, v in named.items()}
    for sample, (by_path, by_name) in named.items():
        names = by_path or by_name
        # Of a.tif and a.ome.tif each has its own, if both are there.
        own = [n for n in names if (".ome" in PurePosixPath(n).name) == sample.endswith(".ome")]
        names = own or names
        if len(names) > 1:
            raise InputError(f"{folder}: {sample} has several predictions: {', '.join(names)}")
        if names:
            chosen[sample] = folder / names[0]
    if not chosen:
        raise InputError(
            f"--data.preds_dir {folder}: no label image of the images to score, such as "
            f"{PurePosixPath(ids[0]).name}_labels.tif (TIFF or PNG)"
        )
    return chosen


def _is_marked(name: str) -> bool:
    return stem_of(name).endswith(PREDICTED)
