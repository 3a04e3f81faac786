"""The errors that are for people: the command prints each as one line, without a traceback.

Each message names the file or the key, the cause and the way out.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence

# What reading a zip archive raises for damage, encryption and unknown methods.
DAMAGE = (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError)


class InputError(ValueError):
    """Something that was given cannot be used; the command exits with 2."""


class OutputError(OSError):
    """A result cannot be written; the command exits with 1."""


def few(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def counted(number: int, things: str) -> str:
    """So many things, for a message: `1 image`, `1,200 images`, `1 nucleus`."""
    one = "nucleus" if things == "nuclei" else things.removesuffix("s")
    return f"{number:,} {one if number == 1 else things}"
