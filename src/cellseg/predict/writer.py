"""When results are written: each as soon as its image is done, so that nothing piles up."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter

from cellseg.cores import cores
from cellseg.data.listing import Shard, readable
from cellseg.errors import InputError, OutputError, few
from cellseg.instances import decode
from cellseg.predict.batches import Batches
from cellseg.predict.drafts import Drafts, is_whole, sweep
from cellseg.predict.journal import Journal, Place
from cellseg.predict.lanes import Lanes
from cellseg.predict.large import LargeResult
from cellseg.predict.processes import Processes
from cellseg.predict.results import FORMATS, About, Result, write_results
from cellseg.predict.tables import write_tables
from cellseg.signals import EXIT_CODES
from cellseg.task import SegmentationTask

log = logging.getLogger(__name__)


class StoppedError(Exception):
    """The work on an image was given up."""


class PredictionWriter(BasePredictionWriter):
    """Writes what was found in each image, and at the end what there is one of in a run.

    A rerun into the same folder keeps what is done, and does the rest.

    Args:
        dir: Folder for the results; by default the name of `--data.predict_dir` with
            `_cellseg` appended. The tree of the images is mirrored in it.
        formats: What to write, as `a,b`, or `all`: `labels` (TIFF), `overlay` (PNG), `probs`
            (TIFF, 0 to 255), `table` (objects.csv, a row a nucleus), `parquet` (the same as
            objects.parquet), `rois` (ImageJ), `geojson` (QuPath), `rle` (rle.csv of the Data
            Science Bowl), `coco` (JSON), `report` (report.html).
        expand: Width of a ring around each nucleus in which the intensities are measured too, in
            um where the pixel size is known, else in px; 0 for none.
        overwrite: Do all files anew, also those that are done.
        verify: Open every result before it counts as done; by default its size must be right.
    """

    def __init__(
        self,
        dir: Path | None = None,
        formats: list[str] = ["labels", "overlay", "table", "report"],  # noqa: B006
        expand: float = 0.0,
        overwrite: bool = False,
        verify: bool = False,
    ) -> None:
        super().__init__(write_interval="batch")
        self.formats = set(FORMATS if formats == ["all"] else formats)
        if not self.formats or self.formats - set(FORMATS):
            raise InputError(
                f"--output.formats {','.join(formats)}: takes all, or some of {', '.join(FORMATS)}"
            )
        if not expand >= 0:
            raise InputError(f"--output.expand {expand:g}: must not be negative")
        self.dir = dir
        self.expand = expand
        self.overwrite = overwrite
        self.verify = verify
        self.journal: Journal | None = None
        self.processes = Processes()
        self._handlers: dict[signal.Signals, Any] = {}

    def start(
        self,
        run: Mapping[str, Any],
        settings: Mapping[str, Any],
        shard: Shard | None = None,
        rank: int = 0,
    ) -> None:
        """Open the results folder.

        Args:
            run: What `run.json` says.
            settings: All that the results of an image depend on besides its file.
            shard: Which files are this run's, where others do the rest.
            rank: Of this process.
        """
        assert self.dir is not None
        self.run = run
        self.shard = shard
        self.journal = Journal(self.dir, f"{shard.name}-{rank}" if shard else str(rank))
        own = {"output.formats": sorted(self.formats), "output.expand": self.expand}
        self._key = self.journal.start({**settings, **own})
        self._began, self._started = time.time(), time.monotonic()

    def not_done(self, base: Path, files: Mapping[str, str]) -> list[str]:
        """The files that are still to be done, with a word on the others.

        Args:
            base: Folder that their names are relative to.
            files: The stems of their results, by name.
        """
        assert self.journal is not None
        journal, settings = self.journal, self._key
        others = {entry.stem: n for n, entry in journal.entries.items() if n not in files}
        replaced = [others[stem] for stem in files.values() if stem in others]
        if replaced:
            log.warning("The results of other images are replaced: %s", few(replaced))
        if self.overwrite:
            return [*files]
        done = {
            file
            for file, stem in files.items()
            if journal.is_done(file, stem, f"{base}/{file}", settings)
        }
        if self.verify:
            with ThreadPoolExecutor(cores()) as threads:  # decompression runs beside Python
                done = set(compress(done, threads.map(self._is_whole, done)))
        todo = [file for file in files if file not in done]
        if len(todo) < len(files):
            log.info("%d of %d images are done already", len(files) - len(todo), len(files))
        again = [file for file in todo if file in journal.entries]
        if again:
            changed = sorted({key for file in again for key in journal.changes(file, settings)})
            log.info(
                "%d images are done again, because %s changed",
                len(again), ", ".join(changed) or "they or their results",
            )  # fmt: skip
        return todo

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        images = len(trainer.datamodule.files.own)  # type: ignore[attr-defined]
        self._lanes = Lanes(images, trainer.strategy.root_device)
        if self._lanes.on_gpu and isinstance(pl_module, SegmentationTask):
            pl_module.batches = Batches(pl_module.batch_probs, self._lanes.count)
            pl_module.decode = partial(self._lanes.aside, decode)
        if threading.current_thread() is threading.main_thread():
            # Lightning's own handler waits for the other processes, who may be done.
            for name in EXIT_CODES:
                number = signal.Signals[name]
                self._handlers[number] = signal.signal(number, self._stop)

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        if not batch["repeat"]:
            work = partial(self._do, batch, prediction, pl_module.decoding)
            if "large" in batch:  # it takes all cores by itself
                self._lanes.wait()
                work()
            else:
                self._lanes.add(work)
        if self.processes.stopped():
            raise StopIteration  # which ends Lightning's loop

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._lanes.wait()
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _close(self) -> None:
        if hasattr(self, "_lanes"):  # there are none before there are images
            self._lanes.close()
        if self.journal is not None:
            self.journal.close()
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _stop(self, number: int, frame: Any) -> None:
        """Stop after the image at hand, or at a second Ctrl-C at once."""
        if number == signal.SIGINT:
            if self.processes.asked:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # while all is being closed
                raise KeyboardInterrupt
            log.warning("Stopping after the image at hand; Ctrl-C again stops at once")
        self.processes.stop(signal.Signals(number).name)

    def finish(self, files: Sequence[str], own: Sequence[str]) -> int:
        """Write the tables, the report and `run.json`, unless other shards are still to end.

        Args:
            files: All files, sorted; those that were not reached are left out.
            own: Those of this run: all, or the shard's.

        Returns:
            How many of its own could not be done.
        """
        assert self.dir is not None and self.journal is not None
        self.journal.reload()
        told = [file for file in files if self.journal.tells_of(file, self._key)]
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
            run = {**self.run, "seconds": round(time.monotonic() - self._started, 3)}
            totals = write_tables(
                self.journal, told, self.formats, {**run, "left": left} if left else run
            )
            page = "report.html" if "report" in self.formats else "summary.csv"
            said = ", ".join(f"{number:,} {name}" for name, number in totals.items())
            log.info("%s; see %s", said, self.dir / page)
        if left:
            log.warning(
                "%s of %s images are left; the same command again does them",
                f"{left:,}", f"{len(mine):,}",
            )  # fmt: skip
        failures = [
            str(self.journal.failures[f]["message"]) for f in own if f in self.journal.failures
        ]
        if failures:
            log.warning("Failed: %s", few(failures, 3))
        return len(failures)

    def _is_whole(self, file: str) -> bool:
        assert self.dir is not None and self.journal is not None
        damaged = [n for n in self.journal.entries[file].outputs if not is_whole(self.dir / n)]
        if damaged:
            log.info("%s: damaged, done again", self.dir / damaged[0])
        return not damaged

    def _tick(self) -> None:
        """Leave a large image in its middle."""
        if self.processes.stopped():
            raise StoppedError

    def _do(self, batch: Mapping[str, Any], find: Callable[[], Any], decoding: Any) -> None:
        """Find the nuclei of one file and write what there is of them; runs in a lane."""
        try:
            self._write(batch, find, decoding)
        except OutputError as error:
            self.processes.stop(str(error))
        except StoppedError:
            pass
        except (OSError, ValueError, MemoryError, RuntimeError) as error:  # the other files go on
            self._fail(batch["file"], str(error) or type(error).__name__)

    def _fail(self, file: str, reason: str) -> None:
        assert self.journal is not None
        facts = {"status": "error", "seconds": "0.000", "message": reason}
        self.journal.add_failure(file, {"file": readable(file), **facts})

    def _write(self, batch: Mapping[str, Any], find: Callable[[], Any], decoding: Any) -> None:
        assert self.dir is not None and self.journal is not None
        file, began = batch["file"], time.monotonic()
        if batch["error"]:
            return self._fail(file, batch["error"])
        prediction = find()
        about = About(
            file=file,
            stem=batch["stem"],
            planes=batch["planes"],
            axes=batch["axes"],
            shape=tuple(batch["shape"]),
            stack=batch["stack"],
            channels=batch["channels"],
            colour=batch["colour"],
            pixel_size=batch["pixel_size"],
            z_step=batch["z_step"],
            scale=prediction["scale"],
            note="; ".join(filter(None, [batch["note"], _adapted(prediction)])),
        )
        with Drafts(self.dir, about.stem) as drafts:
            if "large" in batch:
                kept = LargeResult(
                    about, batch["large"], prediction["maps"], decoding, self._tick, self._keep
                ).write(drafts, self.formats, self.expand)
            else:
                result = Result(
                    labels=prediction["labels"],
                    probs=prediction["probs"],
                    image=batch["image"].float().permute(0, 2, 3, 1).numpy(),
                    pixels=batch["pixels"].tensor.numpy(),
                )
                kept, drafts.digests = self._lanes.aside(
                    write_results, about, result, drafts, self.formats, self.expand
                )
            drafts.move(self.journal.announce(file, drafts.digests))
        for name in {"objects", "rle"} & kept.keys():
            kept[name] = [self._keep(part) for part in kept[name]]
        if "thumbnail" in kept:
            kept["thumbnail"] = self._keep(kept["thumbnail"])
        share = (time.monotonic() - began) / len(kept["rows"])
        facts = {"runtime": self.run["runtime"], "seconds": f"{share:.3f}"}
        kept["rows"] = [{**row, **facts} for row in kept["rows"]]
        sizes = {name: (self.dir / name).stat().st_size for name in drafts.digests}
        facts = {key: batch[key] for key in ("size", "mtime", "sha256")}
        facts |= {"stem": about.stem, "settings": self._key, "outputs": sizes}
        self.journal.add(file, {**facts, **kept})

    def _keep(self, text: str | Place) -> Place:
        """Put aside what only the tables need; it may be there already."""
        assert self.journal is not None
        return self.journal.keep(text) if isinstance(text, str) else text


def _adapted(prediction: Mapping[str, Any]) -> str:
    """What was done to the image, and the flags that would do it again."""
    notes = []
    if prediction["inverted"]:
        notes.append("predicted on the negative (--data.invert true)")
    if prediction["scale"] != 1:
        size = prediction["diameter"]
        notes.append(f"rescaled by {prediction['scale']:.3g} (--data.diameter {size:.4g})")
    return "; ".join(notes)
