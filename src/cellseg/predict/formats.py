"""How a result becomes a file; each appears under its name only when it is complete."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg import __version__
from cellseg.errors import OutputError

SOFTWARE = f"cellseg {__version__}"
# Seen on black, on white, and on the pink and purple of stained tissue.
OUTLINE = (0, 255, 64)


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when the block ends well.

    Raises:
        OutputError: The folder or the file cannot be written.
    """
    name = path.with_name(f".draft-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield name
        os.replace(name, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            name.unlink(missing_ok=True)


def write_labels(path: Path, labels: NDArray[Any]) -> None:
    """A label image (H, W) as a compressed TIFF of its own type."""
    import tifffile

    with draft(path) as name:
        tifffile.imwrite(name, labels, compression="zlib", software=SOFTWARE, metadata=None)


def outlined(image: NDArray[np.float32], labels: NDArray[Any]) -> NDArray[np.uint8]:
    """The image (H, W, 3) in [0, 1] as 8 bit, with the outlines of its nuclei."""
    from skimage.segmentation import find_boundaries

    picture: NDArray[np.uint8] = (image * 255 + 0.5).astype(np.uint8)
    picture[find_boundaries(labels, mode="inner")] = OUTLINE
    return picture


def write_overlay(path: Path, image: NDArray[np.float32], labels: NDArray[Any]) -> None:
    """The image (H, W, 3) in [0, 1] with the outlines of its nuclei, as PNG."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    picture = outlined(image, labels)
    tags = PngInfo()
    tags.add_text("Software", SOFTWARE)
    with draft(path) as name:
        # Level 6, the default, takes three times as long for a tenth of the size.
        Image.fromarray(picture).save(name, pnginfo=tags, compress_level=3)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Rows as CSV; a column that a row lacks stays empty."""
    with draft(path) as name, name.open("w", newline="", encoding="utf-8") as lines:
        table = csv.DictWriter(lines, columns, restval="")
        table.writeheader()
        table.writerows(rows)


def write_text(path: Path, text: str) -> None:
    """A text as it is."""
    with draft(path) as name:
        name.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A mapping as indented JSON; what JSON does not know, such as paths, as text."""
    with draft(path) as name:
        name.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
