"""What tells one file from another."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path


def size_and_time(path: Path | str) -> tuple[int, int]:
    """Bytes of a file, or of all files of a folder, and when the newest was changed, in ns."""
    facts = os.stat(path)
    if not stat.S_ISDIR(facts.st_mode):
        return facts.st_size, facts.st_mtime_ns
    below = [os.stat(Path(folder) / name) for folder, _, names in os.walk(path) for name in names]
    times = [each.st_mtime_ns for each in below]
    return sum(each.st_size for each in below), max(times, default=facts.st_mtime_ns)


def digest_of(path: Path) -> str:
    """The SHA-256 of a file's content, or of that of all files of a folder."""
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()}\0{digest_of(file)}\0".encode())
        return digest.hexdigest()
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
