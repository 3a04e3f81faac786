"""The tables and the report of a whole run, put together from the journal."""

from __future__ import annotations

import base64
import csv
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np

from cellseg.predict.formats import draft, write_csv
from cellseg.predict.journal import Journal

log = logging.getLogger(__name__)

SUMMARY = (
    "file", "plane", "status", "height", "width", "scale", "nuclei", "median_area_px",
    "median_diameter_px", "confidence", "unusual", "seconds", "message",
)  # fmt: skip
# Rows of a sheet in Excel and LibreOffice.
SPREADSHEET = 1_048_576
# Columns of whole numbers; the others are fractions, but for the file's name.
WHOLE = {"plane", "label", "area_px", "ring_area_px", "touches_border"}
# Characters of a part of a Parquet file, which is read and written as one.
CHUNK = 1 << 24
# Images that the report shows; the others are counted.
SHOWN = 1000


def write_tables(
    journal: Journal, files: Collection[str], formats: Collection[str], run: Mapping[str, Any]
) -> dict[str, Any]:
    """Write what there is one of in a run: the summary, the tables and the report.

    Args:
        journal: What is done.
        files: The run's files, sorted; those that were not reached are left out.
        formats: Which tables, see `results.FORMATS`.
        run: What `run.json` says.

    Returns:
        `images`, `errors`, and `nuclei`, or with stacks among the images `planes` in its place,
        since a nucleus is in many planes.
    """
    done = [file for file in files if file in journal.entries]
    failed = [file for file in files if file in journal.failures]
    counts: Counter[str] = Counter()
    write_csv(journal.dir / "summary.csv", _summary(journal, files, counts), SUMMARY)
    totals = {"images": len(done) + len(failed), "errors": len(failed)}
    totals |= {"planes": counts["planes"]} if counts["stacks"] else {"nuclei": counts["nuclei"]}
    if "table" in formats:
        count = _write_objects(journal.dir / "objects.csv", *_objects(journal, done))
        if count >= SPREADSHEET:
            log.warning(
                "objects.csv has %s rows, more than a spreadsheet shows (%s); "
                "--output.formats parquet is made for that",
                f"{count:,}", f"{SPREADSHEET:,}",
            )  # fmt: skip
    if "parquet" in formats:
        _write_parquet(journal.dir / "objects.parquet", *_objects(journal, done))
    if "rle" in formats:
        from cellseg.predict.outlines import RLE_COLUMNS

        texts = (journal.read(file)["rle"] for file in done)
        _write_objects(journal.dir / "rle.csv", RLE_COLUMNS, texts)
    if "report" in formats:
        _write_report(journal, files, {**run, **totals})
    return totals


def _summary(
    journal: Journal, files: Iterable[str], counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    for file in files:
        if file in journal.failures:
            yield journal.failures[file]
        elif file in journal.entries:
            rows = journal.read(file)["rows"]
            counts["planes"] += len(rows)
            counts["stacks"] += rows[0]["plane"] != ""
            counts["nuclei"] += sum(row["nuclei"] for row in rows)
            yield from rows


def _objects(journal: Journal, done: Collection[str]) -> tuple[list[str], Iterator[str]]:
    """The columns of all nuclei, and their rows as CSV without a header, file by file.

    Images of different channels have different columns; what a row lacks is empty.
    """
    headers = dict.fromkeys(journal.read(file)["objects"].partition("\n")[0] for file in done)
    names = [name for header in headers for name in header.split(",")]
    columns = list(dict.fromkeys(names)) or ["file", "plane", "label"]  # where no image was done

    def texts() -> Iterator[str]:
        for file in done:
            content = journal.read(file)["objects"]
            if len(headers) == 1:
                yield content.partition("\n")[2]
                continue
            lines = StringIO()
            table = csv.DictWriter(lines, columns, restval="", lineterminator="\n")
            table.writerows(csv.DictReader(StringIO(content)))
            yield lines.getvalue()

    return columns, texts()


def _write_objects(path: Path, columns: Sequence[str], texts: Iterable[str]) -> int:
    """Write rows of CSV below a header; gives their number."""
    count = 0
    with (
        draft(path, second_name=True) as name,
        name.open("w", newline="", encoding="utf-8") as lines,
    ):
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
    with draft(path) as name, parquet.ParquetWriter(name, schema(list(types.items()))) as writer:
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


def _write_report(journal: Journal, files: Collection[str], run: Mapping[str, Any]) -> None:
    from cellseg.predict.page import write_page

    rows: list[dict[str, Any]] = []
    diameters = np.zeros(1, np.int64)
    shown = 0
    for file in files:
        if file in journal.failures:
            rows.append(journal.failures[file])
            continue
        if file not in journal.entries:
            continue
        entry = journal.read(file)
        counts = np.array(entry["diameters"], np.int64)
        diameters = np.pad(diameters, (0, max(0, len(counts) - len(diameters))))
        diameters[: len(counts)] += counts
        picture = base64.b64decode(entry["thumbnail"]) if shown < SHOWN else b""
        shown += len(entry["rows"])
        extra = {"overlay": entry.get("overlay", ""), "thumbnail": picture}
        rows += [{**row, **extra} for row in entry["rows"]]
    write_page(journal.dir / "report.html", run, rows, diameters, SHOWN)
