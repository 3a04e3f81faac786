"""How a result becomes a file; each appears under its name only when it is complete."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import zipfile
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import count
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg import __version__
from cellseg.adapt import to_grid
from cellseg.data.listing import digest_of, is_own_output
from cellseg.errors import InputError, OutputError

log = logging.getLogger(__name__)

SOFTWARE = f"cellseg {__version__}"
DRAFT = re.compile(r"\.draft-[0-9a-f]{8}\.")
# Of a PNG, before which nothing else may come: its signature and the chunk IHDR.
PNG_HEADER = 8 + 25
# Seen on black, on white, and on the pink and purple of stained tissue.
OUTLINE = (0, 255, 64)
# Side in px of a tile of a large label image.
LABEL_TILE = 512


@contextmanager
def draft(path: Path, second_name: bool = False) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when the block ends well.

    Args:
        path: The file.
        second_name: Where another program holds the file, as a spreadsheet does on Windows,
            write `<name>_2` instead and say so.

    Raises:
        InputError: The name is too long for the file system.
        OutputError: The folder or the file cannot be written.
    """
    # Unique also among machines that share a folder, whose process numbers may be equal.
    name = path.with_name(f".draft-{token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield name
        try:
            os.replace(name, path)
        except PermissionError:
            if not second_name:
                raise
            second = path.with_stem(f"{path.stem}_2")
            os.replace(name, second)
            log.warning("%s is open in another program; written as %s", path, second.name)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # of this file alone
            raise InputError(f"{path.name}: too long for the name of a file; shorten it") from error
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            name.unlink(missing_ok=True)


def make_way(path: Path, digests: Collection[str]) -> None:
    """Rename what another result is about to replace, unless it is as it was written here.

    Args:
        path: Where the result goes.
        digests: Of what was written there; none where that is not known and its tag has to tell.
    """
    if not os.path.isfile(path):
        return
    ours = digest_of(path) in digests if digests else is_own_output(path)
    if ours or not is_whole(path):
        return
    # No image by its name, so nobody's input.
    names = (path.with_name(f"{path.name}.edited{n or ''}") for n in count())
    aside = next(free for free in names if not free.exists())
    path.rename(aside)
    log.warning("%s is not as it was written here: kept as %s", path, aside.name)


def sweep(folder: Path, before: float) -> None:
    """Delete the drafts that killed processes have left.

    Args:
        folder: Where, with all below it.
        before: Drafts that were changed since this time may still be written.
    """
    for parent, _, names in os.walk(folder):
        for name in filter(DRAFT.match, names):
            with suppress(OSError):
                path = Path(parent, name)
                if path.stat().st_mtime < before:
                    path.unlink()


def write_labels(
    path: Path,
    labels: NDArray[Any],
    axes: str = "",
    pixel_size: float | None = None,
    z_step: float | None = None,
) -> None:
    """A label image as a compressed TIFF that shows its nuclei in colours where it can.

    uint16 becomes an ImageJ TIFF with a colour table, since Fiji would show plain labels black;
    uint32, which ImageJ has not, an OME-TIFF. Where either would not keep the shape it is a plain
    TIFF.

    Args:
        path: The file.
        labels: (..., H, W) uint16 or uint32.
        axes: Names of the axes before the last two, of `T` and `Z`; others count as unnamed.
        pixel_size: In um.
        z_step: Distance of two planes of Z in um.
    """
    import tifffile

    highest = float(labels.max(initial=1))
    with draft(path) as name:
        tifffile.imwrite(
            name, labels, **_tags(labels.shape, labels.dtype, highest, axes, pixel_size, z_step)
        )


def write_label_strips(
    path: Path,
    strips: Iterable[NDArray[np.uint32]],
    shape: tuple[int, ...],
    axes: str = "",
    pixel_size: float | None = None,
    z_step: float | None = None,
) -> None:
    """Labels that come in strips (h, W), plane after plane, as a tiled BigTIFF like those above.

    Args:
        path: The file.
        strips: The labels, as many rows at a time as there are.
        shape: (..., H, W) of all of them.
        axes: See `write_labels`.
        pixel_size: In um.
        z_step: See `write_labels`.
    """
    import tifffile

    tags = _tags(shape, np.dtype(np.uint32), 1, axes, pixel_size, z_step)
    with draft(path) as name:
        tifffile.imwrite(
            name, _tiles(strips, shape[-2]), shape=shape, dtype=np.uint32, bigtiff=True,
            tile=(LABEL_TILE, LABEL_TILE), **tags,
        )  # fmt: skip


def _tiles(strips: Iterable[NDArray[Any]], height: int) -> Iterator[NDArray[Any]]:
    """Strips of planes of some height as tiles, row by row; those at the edges are smaller."""
    held: list[NDArray[Any]] = []
    row = 0  # of the plane, after what is held
    for strip in strips:
        held.append(strip)
        row += len(strip)
        rows = np.concatenate(held)
        whole = len(rows) if row == height else len(rows) // LABEL_TILE * LABEL_TILE
        for top in range(0, whole, LABEL_TILE):
            band = rows[top : min(top + LABEL_TILE, whole)]
            for left in range(0, band.shape[1], LABEL_TILE):
                yield band[:, left : left + LABEL_TILE]
        held = [rows[whole:]]
        row %= height


def _tags(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    highest: float,
    axes: str,
    pixel_size: float | None,
    z_step: float | None,
) -> dict[str, Any]:
    """How tifffile is to write labels, see `write_labels`."""
    metadata: dict[str, Any] = {}
    resolution = None
    named = {"": "", "T": "T", "Z": "Z", "TZ": "TZ"}.get(axes, "Z" if len(axes) == 1 else None)
    # Both formats drop axes of length 1.
    kept = named is not None and 1 not in shape[:-2]
    imagej, ome = kept and dtype == np.uint16, kept and dtype == np.uint32
    if imagej:
        metadata = {"LUTs": [_colours()], "Ranges": (0.0, highest), "min": 0.0, "max": highest}
    if pixel_size:
        resolution = (1 / pixel_size, 1 / pixel_size)
        sizes = {"X": pixel_size, "Y": pixel_size}
        if z_step and "Z" in axes:
            sizes["Z"] = z_step
        if imagej:
            metadata |= {"unit": "um", **({"spacing": sizes["Z"]} if "Z" in sizes else {})}
        for side, size in sizes.items() if ome else ():
            metadata |= {f"PhysicalSize{side}": size, f"PhysicalSize{side}Unit": "µm"}
    if imagej or ome:
        metadata["axes"] = f"{named}YX"
    return {
        "imagej": imagej, "ome": ome, "compression": "zlib", "software": SOFTWARE,
        "photometric": "minisblack", "resolution": resolution, "metadata": metadata,
    }  # fmt: skip


def write_probs(path: Path, probs: NDArray[np.float32]) -> None:
    """Probabilities (..., H, W) as a TIFF of 0 to 255."""
    import tifffile

    with draft(path) as name:
        tifffile.imwrite(
            name, to_bytes(probs), compression="zlib", software=SOFTWARE, photometric="minisblack"
        )


def to_bytes(fractions: NDArray[np.float32]) -> NDArray[np.uint8]:
    """0 to 1 as 0 to 255."""
    return (fractions * 255 + 0.5).astype(np.uint8)


@contextmanager
def probs_on_disk(path: Path, shape: tuple[int, ...]) -> Iterator[NDArray[np.uint8]]:
    """A file like that of `write_probs`, uncompressed, as an array to be filled in the block."""
    import tifffile

    with draft(path) as name:
        content = tifffile.memmap(
            name, shape=shape, dtype=np.uint8, bigtiff=True, software=SOFTWARE,
            photometric="minisblack", metadata=None,
        )  # fmt: skip
        yield content
        content.flush()


def outlined(image: NDArray[np.float32], labels: NDArray[Any]) -> NDArray[np.uint8]:
    """The image (H, W, 3) in [0, 1] as 8 bit, with the outlines of its nuclei."""
    picture = to_bytes(image)
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
    if max(labels.shape) > side:
        smaller = shrunk(to_bytes(image), side)
        image = smaller.astype(np.float32) / np.float32(255)
        labels = to_grid(labels, smaller.shape[:2])  # outlines stay as thin as in the full image
    return outlined(image, labels)


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
    with draft(path) as name, name.open("wb") as file:
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


def _colours() -> NDArray[np.uint8]:
    """A colour table (3, 256): 0 is black, neighbouring labels differ."""
    hues = np.arange(256) * 0.61803398875  # the golden ratio spreads them
    waves = [0.62 + 0.38 * np.cos(2 * np.pi * (hues - shift)) for shift in (0, 1 / 3, 2 / 3)]
    table = (255 * np.array(waves)).astype(np.uint8)
    table[:, 0] = 0
    return table


def write_text(path: Path, text: str) -> None:
    """A text as it is."""
    with draft(path) as name:
        name.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A mapping as indented JSON; what JSON does not know, such as paths, as text."""
    with draft(path) as name:
        name.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
