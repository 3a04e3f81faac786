"""What `validate` and `test` report on, and on folders of labels that anyone made."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from tqdm import tqdm

from cellseg.data.datamodule import NucleiDataModule
from cellseg.data.dataset import Annotated
from cellseg.data.masks import whole_labels
from cellseg.errors import InputError, few
from cellseg.metrics import compare
from cellseg.reading.images import read_labels
from cellseg.reading.intensity import intensity_limits, normalise
from cellseg.scoring.files import comparison, write_report
from cellseg.scoring.predictions import find_predictions
from cellseg.scoring.scored import Scored, add, worst

log = logging.getLogger(__name__)


class Report(pl.Callback):
    """Collects the scored images of one run of `validate` or `test`, or of several, as of folds."""

    def __init__(self) -> None:
        self.images: list[Scored] = []
        self.about: dict[str, Any] = {}  # set by `application`: model, command, decoding
        self._runs: list[tuple[str, float, int]] = []  # data, loss, number of images

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if outputs is None:
            return
        name = batch["id"][0]
        group, modality = trainer.datamodule.origin(name)  # type: ignore[attr-defined]

        def picture() -> NDArray[np.uint8]:
            image = batch["image"][0].float().permute(1, 2, 0).cpu().numpy()
            return comparison(image, batch["labels"][0].cpu().numpy(), outputs["preds"])

        add(self.images, Scored(name, group, modality, outputs["sums"]), picture)

    on_validation_batch_end = on_test_batch_end

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data, stage = trainer.datamodule, _stage(trainer)  # type: ignore[attr-defined]
        loss = float(trainer.callback_metrics[f"{stage}/loss"])
        self._runs.append((data.description, loss, len(data.sides[stage])))

    on_validation_end = on_test_end

    def write(self, trainer: pl.Trainer) -> None:
        """Write the report on the images of all runs and all processes, and print its table."""
        stage = _stage(trainer)
        if trainer.world_size > 1:
            shares: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, self.images)
            self.images = [image for share in shares for image in share]
        if trainer.is_global_zero and self.images:
            folder = Path(trainer.default_root_dir)
            sources, losses, counts = zip(*self._runs, strict=True)
            loss = float(np.average(losses, weights=counts))
            about = {"stage": stage, "data": "; ".join(sources), **self.about}
            about[f"{stage}/loss"] = loss
            write_report(folder, about, self.images)
            if isinstance(trainer.logger, TensorBoardLogger):
                for image in worst(self.images):
                    tag = f"{stage}/worst/{image.id}"
                    trainer.logger.experiment.add_image(tag, image.picture, dataformats="HWC")
                trainer.logger.finalize("success")


def _stage(trainer: pl.Trainer) -> str:
    return "val" if trainer.state.fn == TrainerFn.VALIDATING else "test"


def score_folders(datamodule: NucleiDataModule, folder: Path, about: Mapping[str, Any]) -> None:
    """Report on one or two folders of label images, whoever made them.

    Images that a folder lacks are left out and named.

    Args:
        datamodule: With `preds_dir`; it says what is scored.
        folder: Where the report goes.
        about: What else the report says.
    """
    datamodule.setup("test")
    samples = datamodule.sides["test"]
    found = [
        find_predictions(source, [sample.id for sample in samples])
        for source in datamodule.preds_dir
    ]
    lacking = [s.id for s in samples if any(s.id not in paths for paths in found)]
    if lacking:
        log.warning(f"Images without a prediction are left out: {few(lacking)}")
    scored = []
    for paths in found:
        images: list[Scored] = []
        for sample in tqdm(samples, "Scoring", leave=False, disable=None):
            if sample.id in lacking:
                continue
            read = read_labels(paths[sample.id])
            if read.any() and np.array_equal(read, sample.image()[..., 0]):
                raise InputError(
                    f"{paths[sample.id]}: is the image, not its labels; name those "
                    f"{Path(sample.id).name}_labels.tif"
                )
            target, preds = sample.labels(), whole_labels(read)
            if target.shape != preds.shape:
                raise InputError(
                    f"{paths[sample.id]}: {preds.shape[0]} x {preds.shape[1]} px, but its image "
                    f"has {target.shape[0]} x {target.shape[1]}"
                )
            one = Scored(sample.id, *datamodule.origin(sample.id), compare(target, preds))
            add(images, one, partial(_picture, sample, target, preds, datamodule.percentiles))
        scored.append(images)
    if not scored[0]:
        raise InputError("--data.preds_dir: no image has a prediction in both folders")
    facts = {"stage": "test", "data": datamodule.description, **about}
    names = [str(source) for source in datamodule.preds_dir]
    facts |= {"preds": ", ".join(names), "left_out": lacking}
    first, *others = scored
    write_report(folder, facts, first, others[0] if others else None, names)


def _picture(
    sample: Annotated,
    target: NDArray[Any],
    preds: NDArray[Any],
    percentiles: tuple[float, float],
) -> NDArray[np.uint8]:
    image = sample.image()
    return comparison(normalise(image, intensity_limits(image, percentiles)), target, preds)
