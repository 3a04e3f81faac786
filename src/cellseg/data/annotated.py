"""Where annotated images come from: a folder, a zip, a download, or a generator."""

from __future__ import annotations

import logging
from pathlib import Path

from cellseg.data.cache import prepare
from cellseg.data.dataset import Annotated
from cellseg.data.folders import find_samples, only_in_cellpose, open_tree
from cellseg.errors import InputError, few

log = logging.getLogger(__name__)


def find_annotated(
    root: Path | None,
    synthetic: int,
    download: bool,
    cache_dir: Path,
    channel: str | None,
    flag: str,
) -> tuple[str, list[Annotated]]:
    """The name of the source, and its annotated images; warns of images and masks left out.

    Args:
        root: A folder or a zip.
        synthetic: How many images are generated instead.
        download: Whether the Data Science Bowl's are fetched where the root has none.
        cache_dir: Where they are kept decoded.
        channel: That which shows the nuclei, see `channels.to_rgb_planes`.
        flag: What names the root.

    Raises:
        InputError: There are none, or one is damaged.
    """
    if synthetic:
        from cellseg.data.synthetic import Generated

        return "generated nuclei", [Generated(number) for number in range(synthetic)]
    if download:
        from cellseg.data.download import fetch, is_wanted

        folder = root or cache_dir
        root = fetch(folder) if is_wanted(folder) else folder
    if root is None:
        raise InputError(
            "no data: name annotated images with --data.root PATH, or ask for generated "
            "ones with --data.synthetic 48"
        )
    tree = open_tree(root, flag)
    samples, missing, orphans = find_samples(tree)
    if missing:
        advice = only_in_cellpose(tree, missing)
        log.warning(f"Images without a mask are left out: {few(missing)}{advice}")
    if orphans:
        log.warning(f"Masks without an image are left out: {few(orphans)}")
    return str(tree.root), [*prepare(tree, samples, cache_dir, channel)]
