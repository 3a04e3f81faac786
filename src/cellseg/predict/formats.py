"""Labels and probabilities as TIFF."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_OID, uuid5

import numpy as np
from numpy.typing import NDArray

from cellseg.predict.drafts import SOFTWARE

# Side in px of a tile of a large label image.
LABEL_TILE = 512


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
    tags = _tags(labels.shape, labels.dtype, highest, axes, pixel_size, z_step)
    tifffile.imwrite(path, labels, **tags)


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
    tifffile.imwrite(
        path, _tiles(strips, shape[-2]), shape=shape, dtype=np.uint32, bigtiff=True,
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
    named = "Z" if len(axes) == 1 and axes != "T" else axes
    # Both formats drop axes of length 1.
    kept = named in ("", "T", "Z", "TZ") and 1 not in shape[:-2]
    imagej, ome = kept and dtype == np.uint16, kept and dtype == np.uint32
    step = z_step if pixel_size and "Z" in axes else None
    metadata: dict[str, Any] = {"axes": f"{named}YX"} if kept else {}
    if imagej:
        metadata |= {"LUTs": [_colours()], "Ranges": (0.0, highest), "min": 0.0, "max": highest}
        metadata |= {"unit": "um"} if pixel_size else {}
        metadata |= {"spacing": step} if step else {}
    if ome:
        for side, size in (("X", pixel_size), ("Y", pixel_size), ("Z", step)):
            if size:
                metadata |= {f"PhysicalSize{side}": size, f"PhysicalSize{side}Unit": "µm"}
        # tifffile's would make other bytes of the same labels each time
        metadata["UUID"] = str(uuid5(NAMESPACE_OID, f"{SOFTWARE} {shape} {highest} {metadata}"))
    per_unit = 1 if imagej else 1e4  # ImageJ's unit is in its metadata; TIFF has cm, but no um
    return {
        "imagej": imagej, "ome": ome, "compression": "zlib", "software": SOFTWARE,
        "photometric": "minisblack", "metadata": metadata,
        "resolution": (per_unit / pixel_size,) * 2 if pixel_size else None,
        "resolutionunit": "CENTIMETER" if pixel_size and not imagej else "NONE",
    }  # fmt: skip


@contextmanager
def probs_file(path: Path, shape: tuple[int, ...], large: bool) -> Iterator[NDArray[np.uint8]]:
    """Probabilities (..., H, W) from 0 to 255 as a TIFF, an array to be filled in the block.

    Where they are large it is on disk, uncompressed.
    """
    import tifffile

    tags: dict[str, Any] = {"software": SOFTWARE, "photometric": "minisblack"}
    if large:
        tags |= {"bigtiff": True, "metadata": None}
        mapped = tifffile.memmap(path, shape=shape, dtype=np.uint8, **tags)
        yield mapped
        mapped.flush()
    else:
        content = np.empty(shape, np.uint8)
        yield content
        tifffile.imwrite(path, content, compression="zlib", **tags)


def _colours() -> NDArray[np.uint8]:
    """A colour table (3, 256): 0 is black, neighbouring labels differ."""
    hues = np.arange(256) * 0.61803398875  # the golden ratio spreads them
    waves = [0.62 + 0.38 * np.cos(2 * np.pi * (hues - shift)) for shift in (0, 1 / 3, 2 / 3)]
    table = (255 * np.array(waves)).astype(np.uint8)
    table[:, 0] = 0
    return table
