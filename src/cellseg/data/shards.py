"""A part of the files, for one of several independent runs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cellseg.errors import InputError


@dataclass(frozen=True)
class Shard:
    """One of several independent runs over the same files, each of which does its own.

    Attributes:
        index: Which, from 0.
        count: Of how many.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `I/N`.

        Raises:
            InputError: It is no such text.
        """
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise InputError(
                f"--data.shard {text}: must be I/N with I from 0 to N-1, such as 0/8 to 7/8"
            )
        return cls(int(index), int(count))

    @property
    def name(self) -> str:
        """As part of a file's name."""
        return f"{self.index}of{self.count}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def __contains__(self, file: str) -> bool:
        """Whether a file is this one's, by its relative POSIX name alone."""
        digest = hashlib.sha256(file.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.index
