"""When results are written: each as soon as its image is done, so that nothing piles up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.exceptions import SIGTERMException

from cellseg.errors import InputError
from cellseg.predict.formats import write_json
from cellseg.predict.journal import Journal
from cellseg.predict.large import LargeResult
from cellseg.predict.results import FORMATS, About, Outputs, Result, write_results
from cellseg.predict.tables import write_tables

log = logging.getLogger(__name__)


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
    """

    def __init__(
        self,
        dir: Path | None = None,
        formats: list[str] = ["labels", "overlay", "table", "report"],  # noqa: B006
        expand: float = 0.0,
        overwrite: bool = False,
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
        self.journal: Journal | None = None

    def start(self, run: Mapping[str, Any], settings: Mapping[str, Any], rank: int) -> None:
        """Open the results folder.

        Args:
            run: What `run.json` says.
            settings: All that the results of an image depend on besides its file.
            rank: Of this process.
        """
        assert self.dir is not None
        self.run = run
        self.journal = Journal(self.dir, str(rank))
        own = {"output.formats": sorted(self.formats), "output.expand": self.expand}
        self._settings = {**settings, **own}
        self._started = time.monotonic()

    def not_done(self, base: Path, files: list[str]) -> list[str]:
        """The files that are still to be done, with a word on the others."""
        assert self.journal is not None
        self._key = self.journal.start(self._settings)
        if self.overwrite:
            return files
        journal, settings = self.journal, self._key
        todo = [file for file in files if not journal.is_done(file, base / file, settings)]
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
        self._since = time.monotonic()

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
        def tick() -> None:
            if trainer.received_sigterm:  # which Lightning ignores in predict
                raise SIGTERMException

        if not batch["repeat"]:
            self._write(batch, prediction, pl_module.decoding, tick)
        self._since = time.monotonic()
        tick()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The first process reads what the others have written.
        trainer.strategy.barrier()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, SIGTERMException) and trainer.world_size == 1:
            self.finish(trainer.datamodule.files[1])  # type: ignore[attr-defined]

    def finish(self, files: Sequence[str]) -> int:
        """Write the tables, the report and `run.json`.

        Args:
            files: All files of the run, sorted; those that were not reached are left out.

        Returns:
            How many could not be done.
        """
        assert self.dir is not None and self.journal is not None
        self.journal.reload()
        files = [file for file in files if self.journal.tells_of(file, self._key)]
        run = {**self.run, "seconds": round(time.monotonic() - self._started, 3)}
        totals = write_tables(self.journal, files, self.formats, run)
        write_json(self.dir / "run.json", {**run, **totals})
        page = "report.html" if "report" in self.formats else "summary.csv"
        said = ", ".join(f"{number:,} {name}" for name, number in totals.items())
        log.info("%s; see %s", said, self.dir / page)
        return int(totals["errors"])

    def _write(
        self,
        batch: Mapping[str, Any],
        prediction: Mapping[str, Any],
        decoding: Any,
        tick: Callable[[], None],
    ) -> None:
        assert self.dir is not None and self.journal is not None
        file = batch["file"]
        if batch["error"]:
            seconds = f"{time.monotonic() - self._since:.3f}"
            row = {"file": file, "status": "error", "seconds": seconds, "message": batch["error"]}
            self.journal.add_failure(file, row)
            return
        about = About(
            file=file,
            stem=batch["stem"],
            planes=batch["planes"],
            axes=batch["axes"],
            shape=tuple(batch["shape"]),
            channels=batch["channels"],
            pixel_size=batch["pixel_size"],
            scale=prediction["scale"],
            note="; ".join(filter(None, [batch["note"], _adapted(prediction)])),
        )
        outputs = Outputs(self.dir, about.stem, self.journal.keep)
        if "large" in batch:
            large = LargeResult(about, batch["large"], prediction["maps"], decoding, tick)
            kept = large.write(outputs, self.formats, self.expand)
        else:
            result = Result(
                labels=prediction["labels"],
                probs=prediction["probs"],
                image=batch["image"].permute(0, 2, 3, 1).cpu().numpy(),
                pixels=batch["pixels"].cpu().numpy(),
            )
            kept = write_results(about, result, outputs, self.formats, self.expand)
        share = (time.monotonic() - self._since) / len(kept["rows"])
        kept["rows"] = [{**row, "seconds": f"{share:.3f}"} for row in kept["rows"]]
        sizes = {name: (self.dir / name).stat().st_size for name in outputs.written}
        facts = {key: batch[key] for key in ("size", "mtime", "sha256")}
        self.journal.add(file, {**facts, "settings": self._key, "outputs": sizes, **kept})


def _adapted(prediction: Mapping[str, Any]) -> str:
    """What was done to the image, and the flags that would do it again."""
    notes = []
    if prediction["inverted"]:
        notes.append("predicted on the negative (--data.invert true)")
    if prediction["scale"] != 1:
        size = prediction["diameter"]
        notes.append(f"rescaled by {prediction['scale']:.3g} (--data.diameter {size:.4g})")
    return "; ".join(notes)
