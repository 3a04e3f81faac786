"""Files that are only appended to: lines of JSON, and texts that are found by their place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from cellseg.atomic import writing

# Files that are held open to read from; a system may allow 1,024 in all.
OPEN = 100

# File, offset and length of something stored; in JSON a list.
Place = Sequence[Any]


class Store:
    """The files of a folder, which several processes may append to.

    Args:
        dir: The folder; it is made when something is written.
    """

    def __init__(self, dir: Path) -> None:
        self.dir = dir
        self._lengths: dict[str, int] = {}
        self._open: dict[str, BinaryIO] = {}
        self._read: dict[str, int] = {}

    def append(self, name: str, content: bytes) -> Place:
        """Write to the end of a file.

        Raises:
            OutputError: It cannot be written.
        """
        path = self.dir / name
        with writing(path):
            self.dir.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as end:
                end.write(content)
                end.flush()
                offset = end.tell() - len(content)  # another run may write to it too
        return name, offset, len(content)

    def append_text(self, name: str, text: str) -> Place:
        """Write a text to the end of a file; a name on disk in it need not be valid Unicode."""
        return self.append(name, text.encode("utf-8", "surrogatepass"))

    def append_line(self, name: str, content: Mapping[str, Any]) -> Place:
        """Write to a file of lines."""
        # What a killed process began stays on a line of its own.
        name, offset, length = self.append(name, b"\n" + json.dumps(content).encode())
        return name, offset + 1, length - 1

    def new_lines(self, name: str) -> Iterator[tuple[dict[str, Any], Place]]:
        """The whole lines of a file that were not read before."""
        with (self.dir / name).open("rb") as lines:
            offset = lines.seek(self._read.get(name, 0))
            for line in lines:
                place = (name, offset, len(line))
                offset += len(line)
                try:
                    content = json.loads(line)
                except ValueError:  # empty, cut off when a process was killed, or being written
                    continue
                yield content, place
                self._read[name] = offset

    def line(self, place: Place) -> dict[str, Any]:
        """The line at a place."""
        line: dict[str, Any] = json.loads(self._seek(place).read(place[2]))
        return line

    def text(self, place: Place) -> str:
        """The text at a place."""
        return self._seek(place).read(place[2]).decode("utf-8", "surrogatepass")

    def first_line(self, place: Place) -> str:
        """The first line of the text at a place."""
        return self._seek(place).readline().decode().rstrip("\n")

    def length(self, name: str) -> int:
        """Of a file, as it was when first asked for; no file becomes shorter."""
        if name not in self._lengths:
            self._lengths[name] = (self.dir / name).stat().st_size
        return self._lengths[name]

    def close(self) -> None:
        """Close the files that reading has opened."""
        while self._open:
            self._open.popitem()[1].close()

    def _seek(self, place: Place) -> BinaryIO:
        name, offset, _ = place
        if name not in self._open:
            if len(self._open) == OPEN:
                self.close()
            self._open[name] = (self.dir / name).open("rb")
        self._open[name].seek(offset)
        return self._open[name]
