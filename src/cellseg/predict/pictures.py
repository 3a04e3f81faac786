"""Images with the outlines of their nuclei."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg.adapt import to_grid
from cellseg.predict.drafts import SOFTWARE

# Longest side of an overlay in px.
SIDE = 2048
# Bytes of a PNG's signature and of its first chunk, IHDR; other chunks come after them.
PNG_HEADER = 8 + 25
# Seen on black, on white, and on the pink and purple of stained tissue.
OUTLINE = (0, 255, 64)


def to_bytes(fractions: NDArray[np.float32]) -> NDArray[np.uint8]:
    """0 to 1 as 0 to 255."""
    return (fractions * 255 + 0.5).astype(np.uint8)


def outlined(picture: NDArray[np.uint8], labels: NDArray[Any]) -> NDArray[np.uint8]:
    """A picture (H, W, 3) with the outlines of its nuclei."""
    picture = picture.copy()
    picture[inner_boundaries(labels)] = OUTLINE
    return picture


def inner_boundaries(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """The pixels of nuclei (H, W) beside another label, above, below, to the left or the right.

    As `skimage.segmentation.find_boundaries` with mode "inner", in a tenth of its time.
    """
    found = np.zeros(labels.shape, bool)
    across = labels[1:] != labels[:-1]
    found[1:] |= across
    found[:-1] |= across
    along = labels[:, 1:] != labels[:, :-1]
    found[:, 1:] |= along
    found[:, :-1] |= along
    return found & (labels > 0)


def overlay(image: NDArray[np.float32], labels: NDArray[Any], side: int) -> NDArray[np.uint8]:
    """The image (H, W, 3) in [0, 1] with its outlines, made smaller where it exceeds `side` px."""
    picture = shrunk(to_bytes(image), side)
    if picture.shape[:2] != labels.shape:  # outlines stay as thin as in the full image
        labels = to_grid(labels, picture.shape[:2])
    return outlined(picture, labels)


def shrunk(picture: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """A picture (H, W, 3) made smaller where it exceeds `side` px."""
    from PIL import Image

    ratio = side / max(picture.shape)
    if ratio >= 1:
        return picture
    height, width = (max(1, round(size * ratio)) for size in picture.shape[:2])
    smaller = Image.fromarray(picture).resize((width, height), Image.Resampling.BOX)
    return np.asarray(smaller)


def write_overlay(path: Path, picture: NDArray[np.uint8]) -> None:
    """A picture (H, W, 3) as PNG."""
    from imagecodecs import PNG, png_encode
    from PIL.PngImagePlugin import putchunk

    # Pillow tries five filters on each row, and takes three times as long for the same size.
    content = png_encode(np.ascontiguousarray(picture), level=1, filter=PNG.FILTER.SUB)
    with path.open("wb") as file:
        file.write(content[:PNG_HEADER])
        putchunk(file, b"tEXt", b"Software\0", SOFTWARE.encode())
        file.write(content[PNG_HEADER:])


def thumbnail(picture: NDArray[np.uint8], side: int = 256) -> bytes:
    """A picture (H, W, 3) as a JPEG of at most `side` px a side."""
    from PIL import Image

    small = Image.fromarray(picture)
    small.thumbnail((side, side))
    content = BytesIO()
    small.save(content, format="JPEG", quality=80)
    return content.getvalue()
