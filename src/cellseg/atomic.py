"""Files that take their names only when they are complete."""

from __future__ import annotations

import csv
import errno
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

from cellseg.errors import InputError, OutputError

log = logging.getLogger(__name__)

DRAFT = re.compile(r"\.draft-[0-9a-f]{8}(\.\d+)?(\.\w+)?")


@contextmanager
def draft(path: Path, clear_second: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when the block ends well.

    Args:
        path: The file.
        clear_second: Where another program holds the file, as a spreadsheet does on Windows,
            write `second_of` it instead and say so. This is called before with the second name,
            to put aside what may be there.

    Raises:
        InputError: The name is too long for the file system.
        OutputError: The folder or the file cannot be written.
    """
    name = path.with_name(f"{draft_name()}{path.suffix}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield name
            try:
                os.replace(name, path)
            except PermissionError:
                if clear_second is None:
                    raise
                second = second_of(path)
                clear_second(second)
                os.replace(name, second)
                log.warning("%s is open in another program; written as %s", path, second.name)
    finally:
        with suppress(OSError):
            name.unlink(missing_ok=True)


def second_of(path: Path) -> Path:
    """The name for a file of which another program holds the first."""
    return path.with_stem(f"{path.stem}_2")


def write_text(path: Path, text: str) -> None:
    """A text as it is; the bytes of a file's name that are not valid Unicode are written out."""
    with draft(path) as name:
        name.write_text(text, encoding="utf-8", newline="", errors="backslashreplace")


def as_csv(rows: Iterable[Iterable[Any]]) -> str:
    """Rows as the text of a CSV, the same bytes on all systems."""
    lines = io.StringIO(newline="")
    csv.writer(lines, lineterminator="\n").writerows(rows)
    return lines.getvalue()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A mapping as indented JSON; what JSON does not know, such as paths, as text."""
    write_text(path, as_json(content))


def as_json(content: Mapping[str, Any]) -> str:
    """The text of `write_json`."""
    return json.dumps(content, indent=2, default=str) + "\n"


def draft_name() -> str:
    """A new name for what is not complete, see `DRAFT`."""
    # Unique also among machines that share a folder, whose process numbers may be equal.
    return f".draft-{token_hex(4)}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns errors of writing a file into those that are for people."""
    try:
        yield
    except OutputError:  # an OSError too, which names another file
        raise
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # of this file alone
            raise InputError(f"{path.name}: too long for the name of a file; shorten it") from error
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
