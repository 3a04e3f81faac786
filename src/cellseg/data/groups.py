"""Which images belong together: the fields of view of a known set, and groups of the user's."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from cellseg.data.listing import nfc
from cellseg.errors import InputError


@cache
def dsb2018() -> dict[str, dict[str, str]]:
    """The project's split of the 2018 Data Science Bowl images: one row an image id."""
    table = (files("cellseg.data") / "dsb2018.csv").read_text(encoding="utf-8")
    return {row["image_id"]: row for row in csv.DictReader(table.splitlines())}


def known(sample: str) -> dict[str, str]:
    """The row of an image of the Data Science Bowl, in whatever folder it lies; empty of others."""
    return dsb2018().get(sample.rpartition("/")[2], {})


def group_of(ids: Sequence[str], groups: str | None) -> dict[str, str]:
    """Sample id to its group; see `splits.Recipe`."""
    if groups is None:
        return {sample: known(sample).get("field", sample) for sample in ids}
    if groups.lower().endswith(".csv"):
        table = read_column(Path(groups), "group", "--data.groups")
        return {sample: table.get(sample, sample) for sample in ids}
    try:
        pattern = re.compile(nfc(groups))
    except re.error as error:
        raise InputError(
            f"--data.groups {groups}: neither a .csv nor a regular expression ({error})"
        ) from error
    matches = {sample: pattern.search(sample) for sample in ids}
    return {
        sample: ((pattern.groups and match[1]) or match[0]) if match else sample
        for sample, match in matches.items()
    }


def origins(ids: Sequence[str], groups: str | None) -> dict[str, tuple[str, str]]:
    """Sample id to its group (see `splits.Recipe`) and its modality, empty where unknown."""
    group = group_of(ids, groups)
    return {sample: (group[sample], known(sample).get("modality", "")) for sample in ids}


def read_column(path: Path, column: str, flag: str) -> dict[str, str]:
    """A column of a CSV by its column `image_id`.

    Raises:
        InputError: There is no such file or column, or it contradicts itself; names the flag.
    """
    table: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            for row in csv.DictReader(lines):
                sample, value = nfc(row["image_id"] or ""), row[column]
                if not (sample and value):
                    raise InputError(f"{flag} {path}: {sample or 'a row'} has no {column}")
                if table.setdefault(sample, value) != value:
                    raise InputError(
                        f"{flag} {path}: {sample} has two: {table[sample]} and {value}"
                    )
        if not table:
            raise KeyError(column)
        return table
    except OSError as error:
        raise InputError(f"{flag} {path}: {error.strerror or error}") from error
    except (KeyError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{flag} {path}: must be a CSV with the columns image_id and {column}"
        ) from error
