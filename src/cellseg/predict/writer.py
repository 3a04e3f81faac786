"""When results are written: each as soon as its image is done, so that nothing piles up."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from cellseg.data.files import Files, Search
from cellseg.data.listing import readable
from cellseg.errors import InputError, OutputError
from cellseg.instances import decode
from cellseg.predict.batches import Batches
from cellseg.predict.drafts import Drafts
from cellseg.predict.lanes import Lanes
from cellseg.predict.nuclei import LargeNuclei, Nuclei
from cellseg.predict.processes import Processes
from cellseg.predict.results import FORMATS, write_results
from cellseg.predict.run import Run
from cellseg.predict.store import Place
from cellseg.segmenter import View
from cellseg.signals import EXIT_CODES

log = logging.getLogger(__name__)


class StoppedError(Exception):
    """The work on an image was given up."""


class PredictionWriter(pl.Callback):
    """Writes the results of each image at once; the tables and the report of all follow.

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

    run: Run  # set by `application`

    def __init__(
        self,
        dir: Path | None = None,
        formats: list[str] = ["labels", "overlay", "table", "report"],  # noqa: B006
        expand: float = 0.0,
        overwrite: bool = False,
        verify: bool = False,
    ) -> None:
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
        self.processes = Processes()
        self._handlers: dict[signal.Signals, Any] = {}

    def left_to_do(self, search: Search) -> Files:
        """The files that a search finds without those that are done; all processes agree on them.

        The first one looks, since folders that machines share differ for seconds.
        """
        return self.processes.agree(
            lambda: self.run.left_to_do(search.find(self.run.dir), self.overwrite, self.verify)
        )

    def on_predict_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        images = len(trainer.datamodule.files.own)  # type: ignore[attr-defined]
        self._lanes = Lanes(images, trainer.strategy.root_device)
        if self._lanes.on_gpu:
            pl_module.batches = Batches(pl_module.probs, self._lanes.count)
            pl_module.decode_aside = partial(self._lanes.aside, decode)
        if threading.current_thread() is threading.main_thread():
            # Lightning's own handler waits for the other processes, who may be done.
            for name in EXIT_CODES:
                number = signal.Signals[name]
                self._handlers[number] = signal.signal(number, self._stop)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not batch["repeat"]:
            work = partial(self._do, batch, outputs, pl_module.decoding)
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
        if hasattr(self, "run"):
            self.run.journal.store.close()
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

    def _tick(self) -> None:
        """Leave a large image in its middle."""
        if self.processes.stopped():
            raise StoppedError

    def _do(self, batch: Mapping[str, Any], find: Callable[[], Any], decoding: Any) -> None:
        """Find the nuclei of one file and write what there is of them; runs in a lane."""
        if self.processes.asked:  # to stop, while this one was waiting for its lane
            return
        try:
            self._write(batch, find, decoding)
        except OutputError as error:
            self.processes.stop(str(error))
        except StoppedError:
            pass
        except (OSError, ValueError, MemoryError, RuntimeError) as error:  # the other files go on
            self._fail(batch["file"], str(error) or type(error).__name__)

    def _fail(self, file: str, reason: str) -> None:
        facts = {"status": "error", "seconds": "0.000", "message": reason}
        self.run.journal.add_failure(file, {"file": readable(file), **facts}, self.run.key)

    def _write(self, batch: Mapping[str, Any], find: Callable[[], Any], decoding: Any) -> None:
        dir, journal = self.run.dir, self.run.journal
        file, began = batch["file"], time.monotonic()
        if batch["error"]:
            return self._fail(file, batch["error"])
        prediction = find()
        view: View = prediction["view"]
        about = replace(batch["about"].value.noted(_adapted(view)), scale=view.scale)
        if self.expand and about.pixel_size is None:
            about = about.noted(f"no pixel size: rings are {self.expand:g} px wide")
        with Drafts(dir, about.stem) as drafts:
            asked = drafts, self.formats, self.expand
            if "large" in batch:
                maps, image = prediction["maps"], batch["large"]
                with closing(LargeNuclei(about, image, maps, decoding, self._tick)) as large:
                    kept, _ = write_results(about, large, *asked, self._keep)
            else:
                nuclei = Nuclei(
                    labels=prediction["labels"],
                    probs=prediction["probs"],
                    image=batch["image"].float().permute(0, 2, 3, 1).numpy(),
                    pixels=batch["pixels"].value.numpy(),
                )
                kept, drafts.written = self._lanes.aside(write_results, about, nuclei, *asked)
            drafts.move(journal.announce(file, drafts.digests))
        for name in {"objects", "rle"} & kept.keys():
            kept[name] = [self._keep(part) for part in kept[name]]
        if "thumbnail" in kept:
            kept["thumbnail"] = self._keep(kept["thumbnail"])
        share = (time.monotonic() - began) / len(kept["rows"])
        facts = {"runtime": self.run.about["runtime"], "seconds": f"{share:.3f}"}
        kept["rows"] = [{**row, **facts} for row in kept["rows"]]
        sizes = {name: (dir / name).stat().st_size for name in drafts.digests}
        facts = {key: batch[key] for key in ("size", "mtime", "sha256")}
        facts |= {"stem": about.stem, "settings": self.run.key, "outputs": sizes}
        journal.add(file, {**facts, **kept})

    def _keep(self, text: str | Place) -> Place:
        """Put aside what only the tables need; it may be there already."""
        return self.run.journal.keep(text) if isinstance(text, str) else text


def _adapted(view: View) -> str:
    """What was done to the image, and the flags that would do it again."""
    notes = []
    if view.inverted:
        notes.append("predicted on the negative (--data.invert true)")
    if view.scale != 1:
        notes.append(f"rescaled by {view.scale:.3g} (--data.diameter {view.diameter:.4g})")
    return "; ".join(notes)
