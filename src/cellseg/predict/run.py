"""One prediction into a results folder: what is done already, and what there is of the whole."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any

from cellseg.cores import cores
from cellseg.data.files import Files
from cellseg.data.shards import Shard
from cellseg.errors import counted, few
from cellseg.predict.drafts import is_whole, sweep
from cellseg.predict.journal import Journal
from cellseg.predict.tables import write_tables

log = logging.getLogger(__name__)


class Run:
    """A run of `predict` from beginning to end.

    Args:
        dir: The results folder.
        formats: What is written, see `results.FORMATS`.
        about: What `run.json` says.
        settings: All that the results of an image depend on besides its file.
        shard: Which files are this run's, where others do the rest.
        rank: Of this process.

    Attributes:
        key: The hash of the settings.
    """

    def __init__(
        self,
        dir: Path,
        formats: Collection[str],
        about: Mapping[str, Any],
        settings: Mapping[str, Any],
        shard: Shard | None = None,
        rank: int = 0,
    ) -> None:
        self.dir = dir
        self.formats = formats
        self.about = about
        self.shard = shard
        self.journal = Journal(dir, f"{shard.name}-{rank}" if shard else str(rank))
        self.key = self.journal.start(settings)
        self._began, self._started = time.time(), time.monotonic()

    def left_to_do(self, found: Files, overwrite: bool, verify: bool) -> Files:
        """The files that are still to be done, with a word on the others.

        Args:
            found: To do are all of this run.
            overwrite: Do all of them.
            verify: Also do those whose results cannot be read to their end.
        """
        journal, base, files = self.journal, found.base, dict(found.todo)
        others = {entry.stem: n for n, entry in journal.entries.items() if n not in files}
        elsewhere = journal.other_bases(base)
        if elsewhere:
            log.warning(
                f"{self.dir} holds results of images of {few(elsewhere)} too: the tables and the "
                "report tell of this run alone, and results of equal names are replaced; another "
                "--output.dir keeps them apart"
            )
        done = {
            file
            for file, stem in files.items()
            if not overwrite
            and journal.is_done(file, stem, f"{base}/{file}", self.key, bool(elsewhere))
        }
        if verify:
            with ThreadPoolExecutor(cores()) as threads:  # decompression runs beside Python
                done = set(compress(done, threads.map(self._is_whole, done)))
        todo = [file for file in files if file not in done]
        if replaced := [others[files[file]] for file in todo if files[file] in others]:
            log.warning("The results of other images are replaced: %s", few(replaced))
        left = replace(found, todo=[(file, files[file]) for file in todo])
        if overwrite:
            return left
        if len(todo) < len(files):
            log.info("%d of %d images are done already", len(files) - len(todo), len(files))
        again = [file for file in todo if file in journal.entries]
        if again:
            changed = sorted({key for file in again for key in journal.changes(file, self.key)})
            log.info(
                "Done again: %s, because %s changed",
                counted(len(again), "images"), ", ".join(changed) or "they or their results",
            )  # fmt: skip
        return left

    def finish(self, found: Files) -> int:
        """Write the tables, the report and `run.json`, unless other shards are still to end.

        Files that were not reached are left out. Gives how many of its own could not be done.
        """
        files, own = found.names, found.own
        self.journal.reload()
        told = [file for file in files if self.journal.tells_of(file, self.key)]
        waiting = self.shard is not None and len(told) < len(files)
        mine = own if waiting else files
        left = len(set(mine) - set(told))
        if waiting:
            log.info(
                "%s of the %s images of all shards are done; the last shard to end writes the "
                "tables, or the same command without --data.shard",
                f"{len(told):,}", f"{len(files):,}",
            )  # fmt: skip
        else:
            if not self.shard and not left:
                sweep(self.dir, self._began)
            run = {**self.about, "seconds": round(time.monotonic() - self._started, 3)}
            totals = write_tables(
                self.journal, told, self.formats, {**run, "left": left} if left else run
            )
            if stay := self._left_of_others(files):
                log.info(
                    "The results of images that are not in this run stay, and the tables leave "
                    "them out: %s", few(stay),
                )  # fmt: skip
            page = "report.html" if "report" in self.formats else "summary.csv"
            said = ", ".join(counted(number, things) for things, number in totals.items())
            log.info("%s; see %s", said, self.dir / page)
        if left:
            log.warning(
                "%s of %s images are left; the same command again does them",
                f"{left:,}", f"{len(mine):,}",
            )  # fmt: skip
        failures = [
            str(self.journal.failures[f]["message"])
            for f in own
            if f in self.journal.failures and self.journal.tells_of(f, self.key)
        ]
        if failures:
            log.warning("Failed: %s", few(failures, 3))
        return len(failures)

    def _left_of_others(self, files: Sequence[str]) -> list[str]:
        """Images whose results are there although they are not among the files."""
        entries, known = self.journal.entries, set(files)
        taken = {entries[file].stem for file in known & entries.keys()}
        return sorted(
            file
            for file, entry in entries.items()
            if file not in known
            and entry.stem not in taken
            and any((self.dir / name).exists() for name in entry.outputs)
        )

    def _is_whole(self, file: str) -> bool:
        damaged = [n for n in self.journal.entries[file].outputs if not is_whole(self.dir / n)]
        if damaged:
            log.info("%s: damaged, done again", self.dir / damaged[0])
        return not damaged
