"""What a results folder already holds: one line a finished file, so that a rerun does the rest."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from cellseg.data.digests import digest_of, size_and_time
from cellseg.predict.drafts import FOLDER
from cellseg.predict.store import Place, Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """A finished file, as far as it is kept in memory.

    Attributes:
        stem: What its results are called.
        size: Of the input, in bytes.
        mtime: Of the input, in ns.
        sha256: Of the input.
        settings: Hash of what the results depend on besides.
        outputs: Written files, relative to the results folder, to their sizes in bytes.
        kept: A file of `Journal.keep`, and its length when this one was done: where it is shorter
            now, what was kept of this one is lost.
        place: Of the whole entry.
    """

    stem: str
    size: int
    mtime: int
    sha256: str
    settings: str
    outputs: Mapping[str, int]
    kept: tuple[str, int]
    place: Place


class Journal:
    """The finished files of a results folder.

    Each process appends to a journal of its own. Before the results of a file are moved into
    place, a line holds their digests (`announce`), so that they are known as ours whatever
    happens; afterwards another line marks the file as done (`add`). When a journal is read, the
    newest complete line of a file counts. What only the tables of the run need lies in a second
    file, which a rerun does not read: an image may have a million nuclei.

    Args:
        dir: The results folder.
        writer: Name of this process's journal.

    Attributes:
        entries: By the name of the file.
        failures: File to its row of the summary, where it could not be done.
        tables: Files of the whole run, such as summary.csv: name to the digests of all versions
            that were ever written.
        store: The files on disk.
    """

    def __init__(self, dir: Path, writer: str = "0") -> None:
        self.dir = dir
        self.store = Store(dir / FOLDER)
        self._name = f"journal-{writer}.jsonl"
        self.entries: dict[str, Entry] = {}
        self.failures: dict[str, dict[str, Any]] = {}
        self._failed_with: dict[str, str | None] = {}  # file to the hash of the settings
        self.tables: dict[str, set[str]] = {}
        # Of the lines with digests, for files that are under way or have failed.
        self._digests_at: dict[str, Place] = {}
        self._kept = (f"tables-{writer}.txt", 0)
        self._times: dict[str, int] = {}
        self._values: dict[str, dict[str, Any]] = {}
        self._bases: set[str] = set()  # folders that the files are from
        # To be told before the first result: a run in which nothing is done leaves nothing.
        self._headings: list[dict[str, Any]] = []
        self._lock = Lock()  # images are worked on side by side, see `Lanes`
        self._load(self._names())

    def start(self, values: Mapping[str, Any]) -> str:
        """Begin a run whose results depend on these settings; gives their hash."""
        text = json.dumps(values, sort_keys=True, default=str)
        settings = hashlib.sha256(text.encode()).hexdigest()[:16]
        if settings not in self._values:
            self._values[settings] = json.loads(text)  # as it will be read again
            self._headings.append({"settings": settings, "values": self._values[settings]})
        return settings

    def other_bases(self, base: Path) -> list[str]:
        """Folders besides this one that files were from, as far as they are still there."""
        here = os.path.realpath(base)
        if here not in self._bases:
            self._bases.add(here)
            self._headings.append({"base": here})
        return sorted(other for other in self._bases - {here} if os.path.isdir(other))

    def is_done(
        self, file: str, stem: str, source: Path | str, settings: str, by_content: bool = False
    ) -> bool:
        """Whether a file's results are there, whole, and of this input and these settings.

        Args:
            file: Name of the file in the journal.
            stem: What its results are to be called.
            source: The file itself.
            settings: From `start`.
            by_content: Do not trust a file to be the same because its size and time are.
        """
        entry = self.entries.get(file)
        if entry is None or (entry.stem, entry.settings) != (stem, settings):
            return False
        if file in self._digests_at:  # a process was killed while it replaced the results
            return False
        try:
            size, mtime = size_and_time(source)
            if size != entry.size:
                return False
            # A `Path` for each output of 100,000 files takes seconds.
            for name, size in entry.outputs.items():
                if os.stat(f"{self.dir}/{name}").st_size != size:
                    return False
            path, length = entry.kept
            if length and self.store.length(path) < length:
                return False
        except OSError:
            return False
        # A copy has a time of its own, and the same pixels.
        same_time = mtime == entry.mtime and not by_content
        return same_time or digest_of(Path(source)) == entry.sha256

    def changes(self, file: str, settings: str) -> list[str]:
        """The settings in which an earlier result of a file differs from those of this run."""
        entry = self.entries.get(file)
        before = self._values.get(entry.settings, {}) if entry else {}
        now = self._values[settings]
        return sorted(key for key in before.keys() & now.keys() if before[key] != now[key])

    def tells_of(self, file: str, settings: str) -> bool:
        """Whether a file is done with these settings, or could not be done."""
        if file in self.failures:
            return self._failed_with[file] == settings
        return file in self.entries and self.entries[file].settings == settings

    def keep(self, text: str) -> Place:
        """Store a text that only the tables of the run need; the file's entry takes the place."""
        with self._lock:
            place = self.store.append_text(self._kept[0], text)
            self._kept = (place[0], place[1] + place[2])
            return place

    def announce(self, file: str, digests: Mapping[str, str]) -> dict[str, list[str]]:
        """Tell what the results of a file will hold, before they take their places.

        Args:
            file: Its name.
            digests: Of the results, by their names.

        Returns:
            Digests of all that was written under any name for this file before.
        """
        with self._lock:
            known = self._digests(file)
            told = {name: sorted({*known.get(name, ()), digests[name]}) for name in digests}
            self._tell({"announced": file, "digests": known | told})
            return known

    def _digests(self, file: str) -> dict[str, list[str]]:
        place = self._place_of_digests(file)
        return dict(self.store.line(place)["digests"]) if place else {}

    def _place_of_digests(self, file: str) -> Place | None:
        if file in self.entries and file not in self._digests_at:
            place: Place | None = self.read(file)["digests_at"]
            return place
        return self._digests_at.get(file)

    def add_table(self, name: str, draft: Path) -> str:
        """Note the digest of a file of the whole run, before it is in place and seen by others.

        Returns:
            Its digest.
        """
        digest = digest_of(draft)
        self._tell({"table": name, "digest": digest})
        return digest

    def add(self, file: str, entry: Mapping[str, Any]) -> None:
        """Tell that a file is done.

        What an earlier run wrote of it and this one did not is deleted, unless someone has
        changed it.

        Args:
            file: Its name.
            entry: The fields of `Entry`, and what else there is.
        """
        with self._lock:
            self._replace(file, {"file": file, **entry, "kept": self._kept}, entry["outputs"])

    def add_failure(self, file: str, row: Mapping[str, Any], settings: str) -> None:
        """Tell that a file could not be done; it is tried again by the next run.

        What an earlier run wrote of it is deleted, unless someone has changed it.
        """
        with self._lock:
            self._replace(file, {"failed": file, "row": dict(row), "settings": settings}, ())

    def _replace(self, file: str, content: Mapping[str, Any], outputs: Collection[str]) -> None:
        while self._headings:
            self.store.append_line(self._name, self._headings.pop())
        known = self._digests(file)
        self._tell({**content, "digests_at": self._place_of_digests(file)})
        for name in known.keys() - set(outputs):
            self.remove(name, known[name])

    def _tell(self, content: Mapping[str, Any]) -> None:
        # Of machines that share a folder, one may be ahead in time.
        now = max(time.time_ns(), self._times.get(_subject(content), 0) + 1)
        content = {**content, "time": now}
        self._take(content, self.store.append_line(self._name, content))

    def remove(self, name: str, digests: Collection[str]) -> None:
        """Delete a file if it has one of these digests; else someone has changed it."""
        path = self.dir / name
        try:
            if path.is_file() and digest_of(path) in digests:
                path.unlink()
        except OSError as error:  # as of a file that is open in another program
            log.warning(f"{path}: cannot be deleted, and is of an earlier run: {error.strerror}")

    def read(self, file: str) -> dict[str, Any]:
        """The whole entry of a file."""
        return self.store.line(self.entries[file].place)

    def reload(self) -> None:
        """Take in what other processes have finished since the last time."""
        self._load(name for name in self._names() if name != self._name)

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.store.dir.glob("journal-*.jsonl"))

    def _load(self, names: Iterable[str]) -> None:
        for name in names:
            for content, place in self.store.new_lines(name):
                self._take(content, place)

    def _take(self, content: Mapping[str, Any], place: Place) -> None:
        if "values" in content:
            self._values[content["settings"]] = content["values"]
            return
        if "base" in content:
            self._bases.add(content["base"])
            return
        file = _subject(content)
        if "table" in content:
            self.tables.setdefault(file, set()).add(content["digest"])
            return
        if content["time"] < self._times.get(file, 0):
            return
        if "announced" in content:
            self._times[file] = content["time"]
            self._digests_at[file] = place
            return
        self._times[file] = content["time"]
        self.entries.pop(file, None)
        self.failures.pop(file, None)
        self._digests_at.pop(file, None)
        if "failed" in content:
            self.failures[file] = content["row"]
            self._failed_with[file] = content.get("settings")
            if content["digests_at"]:
                self._digests_at[file] = content["digests_at"]
        else:
            facts = {**content, "place": place}
            self.entries[file] = Entry(*(facts[name] for name in Entry.__slots__))


def _subject(content: Mapping[str, Any]) -> str:
    """Which file a line of a journal tells of."""
    return str(
        next(content[key] for key in ("file", "failed", "announced", "table") if key in content)
    )
