"""The tables and the report of a whole run, put together from the journal."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cellseg.atomic import as_csv, as_json, draft, second_of
from cellseg.data.digests import digest_of
from cellseg.errors import InputError
from cellseg.predict.drafts import make_way
from cellseg.predict.journal import Journal
from cellseg.predict.store import Place

T = TypeVar("T")

log = logging.getLogger(__name__)

SUMMARY = (
    "file", "plane", "status", "height", "width", "scale", "nuclei", "median_area_px",
    "median_diameter_px", "confidence", "unusual", "runtime", "seconds", "message",
)  # fmt: skip
# Rows of a sheet in Excel and LibreOffice.
SPREADSHEET = 1_048_576
# Columns of whole numbers; the others are fractions, but for the file's name.
WHOLE = {
    *("plane", "label", "area_px", "ring_area_px", "touches_border"),
    *("bbox_top_px", "bbox_left_px", "bbox_bottom_px", "bbox_right_px"),
}
# Characters of a part of a Parquet file, which is read and written as one.
CHUNK = 1 << 24
# Rows that the report shows; the others are counted.
SHOWN = 1000


def write_tables(
    journal: Journal, files: Collection[str], formats: Collection[str], run: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the files of the whole run: the summary, the tables, the report and `run.json`.

    Args:
        journal: What is done.
        files: The run's files, sorted, of each of which the journal tells.
        formats: Which tables, see `results.FORMATS`.
        run: What `run.json` says.

    Returns:
        `images`, `errors`, and `nuclei`, or with stacks among the images `planes` in its place,
        since a nucleus is in many planes; and how many images were `rescaled`, if any.
    """
    found = _Found(report="report" in formats)
    written = set()

    def put(name: str, write: Callable[[Path], T]) -> T:
        path = journal.dir / name

        def clear(place: Path) -> None:
            with suppress(PermissionError, InputError):  # it is open in another program
                make_way(place, journal.tables[name])

        with draft(path, clear) as unfinished:
            result = write(unfinished)
            digest = journal.add_table(name, unfinished)
            journal.reload()
            clear(path)
        second = second_of(path)
        both = second.is_file() and path.is_file()
        if both and digest_of(path) == digest:  # an earlier run could not write the first
            journal.remove(second.name, journal.tables[name])
        written.add(name)
        return result

    with closing(journal.store):
        summary = _summary(journal, files, found)
        put("summary.csv", lambda path: _write_rows(path, SUMMARY, summary))
        totals = {"images": len(files), "errors": found.errors}
        totals |= {"planes": found.planes} if found.stacks else {"nuclei": found.nuclei}
        totals |= {"rescaled": found.rescaled} if found.rescaled else {}
        columns = _columns(journal, found.objects)
        objects = partial(_objects, journal, found.objects, columns)
        if "table" in formats:
            count = put("objects.csv", lambda path: _write_rows(path, columns, objects()))
            if count >= SPREADSHEET:
                log.warning(
                    "objects.csv has %s rows, more than a spreadsheet shows (%s); "
                    "--output.formats parquet is made for that",
                    f"{count:,}", f"{SPREADSHEET:,}",
                )  # fmt: skip
        if "parquet" in formats:
            put("objects.parquet", lambda path: _write_parquet(path, columns, objects()))
        if "rle" in formats:
            from cellseg.predict.outlines import RLE_COLUMNS

            rle = map(journal.store.text, found.rle)
            put("rle.csv", lambda path: _write_rows(path, RLE_COLUMNS, rle))
        if "report" in formats:
            from cellseg.predict.page import write_page

            about = {**run, **totals}
            put(
                "report.html",
                lambda path: write_page(
                    path, about, found.rows, found.diameters, SHOWN, sorted(written)
                ),
            )
        text = as_json({**run, **totals})
        put("run.json", lambda path: path.write_text(text, encoding="utf-8"))
        for name in journal.tables.keys() - written:  # of an earlier run
            journal.remove(name, journal.tables[name])
    return totals


@dataclass
class _Found:
    """What `_summary` collects on its one pass over the entries.

    Attributes:
        report: Whether `rows` and `diameters` are wanted.
        objects: Where the parts of the table of nuclei are.
        rle: The same of run lengths.
        rows: Of the report, see `page.write_page`.
        diameters: As there.
    """

    report: bool
    errors: int = 0
    rescaled: int = 0
    planes: int = 0
    stacks: int = 0
    nuclei: int = 0
    objects: list[Place] = field(default_factory=list)
    rle: list[Place] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    diameters: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))


def _summary(journal: Journal, files: Iterable[str], found: _Found) -> Iterator[str]:
    """The rows of the summary as CSV; what else their entries hold goes into `found` on the way."""
    for file in files:
        if file in journal.failures:
            rows = [journal.failures[file]]
            found.errors += 1
            if found.report:
                found.rows += rows
        else:
            entry = journal.read(file)
            rows = entry["rows"]
            found.rescaled += rows[0]["scale"] != "1"
            found.planes += len(rows)
            found.stacks += rows[0]["plane"] != ""
            found.nuclei += sum(row["nuclei"] for row in rows)
            found.objects += entry.get("objects", ())
            found.rle += entry.get("rle", ())
            if found.report:
                _report(journal, entry, found)
        yield as_csv([row.get(name, "") for name in SUMMARY] for row in rows)


def _report(journal: Journal, entry: Mapping[str, Any], found: _Found) -> None:
    counts = entry["diameters"]
    if len(counts) > len(found.diameters):
        found.diameters = np.pad(found.diameters, (0, len(counts) - len(found.diameters)))
    found.diameters[: len(counts)] += np.array(counts, np.int64)
    shown = len(found.rows) - found.errors < SHOWN
    picture = journal.store.text(entry["thumbnail"]) if shown else ""
    rows = [dict(row) for row in entry["rows"]]
    # The overlay of a stack is of the plane with the most nuclei.
    best = max(rows, key=lambda row: int(row["nuclei"]))
    best |= {"overlay": entry.get("overlay", ""), "thumbnail": picture}
    found.rows += rows


def _columns(journal: Journal, parts: Iterable[Place]) -> list[str]:
    """The columns of all nuclei: images of different channels have different ones.

    Those of an image stand in its order, so that the last ones of all stay the last.
    """
    columns: list[str] = []
    for header in dict.fromkeys(journal.store.first_line(part) for part in parts):
        names = header.split(",")
        for place, name in enumerate(names):
            if name not in columns:
                known = [columns.index(later) for later in names[place:] if later in columns]
                columns.insert(min(known, default=len(columns)), name)
    return columns or ["file", "plane", "label"]  # where no image was done


def _objects(journal: Journal, parts: Iterable[Place], columns: Sequence[str]) -> Iterator[str]:
    """The rows of all nuclei as CSV without a header, part by part; what a row lacks is empty."""
    for part in parts:
        content = journal.store.text(part)
        header, _, rows = content.partition("\n")
        if header == ",".join(columns):
            yield rows
            continue
        lines = StringIO()
        table = csv.DictWriter(lines, columns, restval="", lineterminator="\n")
        table.writerows(csv.DictReader(StringIO(content)))
        yield lines.getvalue()


def _write_rows(path: Path, columns: Sequence[str], texts: Iterable[str]) -> int:
    """Write rows of CSV below a header; gives their number."""
    count = 0
    with path.open("w", newline="", encoding="utf-8") as lines:
        lines.write(",".join(columns) + "\n")
        for text in texts:
            lines.write(text)
            count += text.count("\n")
    return count


def _write_parquet(path: Path, columns: Sequence[str], texts: Iterable[str]) -> None:
    from pyarrow import csv as arrow
    from pyarrow import float64, int64, parquet, schema, string

    types = {name: int64() if name in WHOLE else float64() for name in columns}
    types["file"] = string()
    reading = arrow.ReadOptions(column_names=list(columns))
    converting = arrow.ConvertOptions(column_types=types)
    with parquet.ParquetWriter(path, schema(list(types.items()))) as writer:
        for chunk in _chunks(texts, CHUNK):
            writer.write_table(
                arrow.read_csv(
                    BytesIO(chunk.encode()), read_options=reading, convert_options=converting
                )
            )


def _chunks(texts: Iterable[str], size: int) -> Iterator[str]:
    """Texts joined until they have `size` characters; none is empty."""
    chunk = StringIO()
    for text in texts:
        chunk.write(text)
        if chunk.tell() >= size:
            yield chunk.getvalue()
            chunk = StringIO()
    if chunk.tell():
        yield chunk.getvalue()
