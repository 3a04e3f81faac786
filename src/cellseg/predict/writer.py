"""When results are written: each as soon as its image is done, so that nothing piles up."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.exceptions import SIGTERMException

from cellseg.predict.formats import write_csv, write_json, write_labels, write_overlay

log = logging.getLogger(__name__)

COLUMNS = (
    "file", "status", "height", "width", "nuclei", "median_area_px", "seconds", "message",
)  # fmt: skip


class PredictionWriter(BasePredictionWriter):
    """Writes labels and an overlay of every image, `summary.csv` and `run.json`.

    Args:
        dir: Folder for the results; by default the name of `--data.predict_dir` with
            `_cellseg` appended. The tree of the images is mirrored in it.
    """

    def __init__(self, dir: Path | None = None) -> None:
        super().__init__(write_interval="batch")
        self.dir = dir
        self.run: dict[str, Any] = {}  # set by `application`: what `run.json` says
        self.rows: list[dict[str, Any]] = []

    @property
    def failures(self) -> int:
        """Files that could not be done; complete on rank 0 once predict has ended."""
        return sum(row["status"] != "ok" for row in self.rows)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = self._since = time.monotonic()

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
            row = {"file": batch["file"], "status": "ok", "message": batch["note"]}
            if batch["error"]:
                row |= {"status": "error", "message": batch["error"]}
            else:
                row |= self._write(batch, prediction["labels"])
            row["seconds"] = f"{time.monotonic() - self._since:.3f}"
            self.rows.append(row)
        self._since = time.monotonic()
        if trainer.received_sigterm:  # which Lightning ignores in predict
            raise SIGTERMException

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            shares: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, self.rows)
            self.rows = [row for share in shares for row in share]
        if trainer.is_global_zero:
            self._finish()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, SIGTERMException) and trainer.world_size == 1:
            self._finish()

    def _write(self, batch: dict[str, Any], labels: np.ndarray[Any, Any]) -> dict[str, Any]:
        assert self.dir is not None
        image = batch["image"][0].permute(1, 2, 0).cpu().numpy()
        stem = batch["stem"]
        write_labels(self.dir / f"{stem}_labels.tif", labels)
        write_overlay(self.dir / f"{stem}_overlay.png", image, labels)
        areas = np.bincount(labels.ravel())[1:]
        return {
            "height": labels.shape[0],
            "width": labels.shape[1],
            "nuclei": len(areas),
            "median_area_px": f"{np.median(areas):g}" if len(areas) else "",
        }

    def _finish(self) -> None:
        assert self.dir is not None
        self.rows.sort(key=lambda row: row["file"])
        write_csv(self.dir / "summary.csv", self.rows, COLUMNS)
        totals = {
            "images": len(self.rows),
            "errors": self.failures,
            "nuclei": sum(row.get("nuclei", 0) for row in self.rows),
            "seconds": round(time.monotonic() - self._started, 3),
        }
        write_json(self.dir / "run.json", {**self.run, **totals})
        log.info(
            "%d images, %d errors, %d nuclei; see %s",
            *(totals[key] for key in ("images", "errors", "nuclei")),
            self.dir / "summary.csv",
        )
