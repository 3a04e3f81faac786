"""What TensorBoard shows."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from cellseg.errors import InputError


class Dashboard(pl.Callback):
    """Writes to TensorBoard what scalars do not tell.

    Images per second; after an epoch of validation a precision-recall curve and a panel of
    the same few images (image, truth, probability, errors); at the start the config as text,
    and the hyper-parameters with the best scores.

    Args:
        images: Number of validation images in the panel.
        every_n_epochs: Epochs between panels; the last one of `max_epochs` always has one.
        side: Longest side of a panel image in px.
    """

    THRESHOLDS = 101

    def __init__(self, images: int = 6, every_n_epochs: int = 5, side: int = 384) -> None:
        if min(every_n_epochs, side) < 1 or images < 0:
            raise InputError(
                "--dashboard.every_n_epochs and --dashboard.side must be positive, "
                "--dashboard.images not negative"
            )
        self.images = images
        self.every_n_epochs = every_n_epochs
        self.side = side
        # Set by `application`: the config, and the settings by which runs are told apart.
        self.config_text = ""
        self.settings: dict[str, Any] = {}
        self._best: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = state_dict["best"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_clock()  # Lightning starts no epoch when it resumes within one
        # A run of few steps has a curve too.
        steps = trainer.num_training_batches / trainer.accumulate_grad_batches
        most = min(trainer.log_every_n_steps, max(1, int(steps)))  # type: ignore[attr-defined]
        trainer.log_every_n_steps = most  # type: ignore[attr-defined]
        writer = _writer(trainer)
        if writer is not None and self.config_text:
            # Indented by four, Markdown shows it as it is.
            text = "".join(f"    {line}\n" for line in self.config_text.splitlines())
            writer.add_text("config", text)
            writer.add_text(
                "panel", "image, truth, probability, errors (white right, red missed, blue extra)"
            )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_clock()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._images_seen += len(batch["image"]) * trainer.world_size
        seconds = max(time.monotonic() - self._since, 1e-9)
        pl_module.log("train/images_per_second", self._images_seen / seconds)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._histogram = torch.zeros(2, self.THRESHOLDS, dtype=torch.int64)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if outputs is None or trainer.sanity_checking:
            return
        probs, target = outputs["probs"][0], batch["labels"][0] > 0
        for row, value in enumerate((target, ~target)):
            # TensorBoard's thresholds are 0, 0.01, …, 1.
            steps = (probs[value].nan_to_num(0) * (self.THRESHOLDS - 1)).long()
            self._histogram[row] += torch.bincount(steps, minlength=self.THRESHOLDS).cpu()
        if self._is_panel_epoch(trainer) and batch_idx in self._panel_batches(trainer):
            panel = panel_row(batch["image"][0], target, probs, self.side)
            writer = _writer(trainer)
            if writer is not None:
                writer.add_image(f"panel/{batch['id'][0]}", panel, _step(trainer))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        histogram = trainer.strategy.reduce(self._histogram.to(pl_module.device), reduce_op="sum")
        writer = _writer(trainer)
        if writer is None or trainer.sanity_checking:
            return
        _add_pr_curve(writer, torch.as_tensor(histogram).cpu(), _step(trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        scores = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if not trainer.sanity_checking and scores.get("val/map", 0) > self._best.get("val/map", -1):
            self._best = scores

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        logger = _logger(trainer)
        if logger is not None:
            named = {f"best/{key.removeprefix('val/')}": value for key, value in self._best.items()}
            logger.log_hyperparams(self.settings, named)

    def _start_clock(self) -> None:
        self._since, self._images_seen = time.monotonic(), 0

    def _panel_batches(self, trainer: pl.Trainer) -> set[int]:
        # Spread over the validation images, which are sorted, so that all kinds are shown.
        size = int(trainer.num_val_batches[0])
        count = min(self.images, size)
        return {place * size // count for place in range(count)}

    def _is_panel_epoch(self, trainer: pl.Trainer) -> bool:
        epoch = trainer.current_epoch
        return epoch % self.every_n_epochs == 0 or epoch + 1 == trainer.max_epochs


def panel_row(image: Tensor, target: Tensor, probs: Tensor, side: int) -> Tensor:
    """Image, truth, probability and errors side by side.

    Correct nuclei are white in the errors, missed pixels red, extra ones blue: colours that
    stay apart for the colour-blind.

    Args:
        image: (3, H, W) in [0, 1].
        target: (H, W) boolean.
        probs: (H, W) in [0, 1].
        side: Larger images are cropped to their top-left corner.

    Returns:
        (3, h, 4 * w + 12) on the CPU, with h and w at most `side`.
    """
    preds = probs > 0.5
    errors = torch.stack([target, target & preds, preds]).float()
    tiles = [image.float(), target.float().expand(3, -1, -1), probs.expand(3, -1, -1), errors]
    cut = [tile[:, :side, :side].cpu() for tile in tiles]
    gap = torch.full((3, cut[0].shape[1], 4), 0.5)
    return torch.cat([cut[0], gap, cut[1], gap, cut[2], gap, cut[3]], dim=2)


def _logger(trainer: pl.Trainer) -> TensorBoardLogger | None:
    """That of TensorBoard, in the first process; there may be others."""
    ours = (each for each in trainer.loggers if isinstance(each, TensorBoardLogger))
    return next(ours, None) if trainer.is_global_zero else None


def _writer(trainer: pl.Trainer) -> Any:
    logger = _logger(trainer)
    return logger and logger.experiment


def _step(trainer: pl.Trainer) -> int:
    """Where Lightning logs the scores of a validation."""
    return trainer.global_step - 1


def _add_pr_curve(writer: Any, histogram: Tensor, step: int) -> None:
    # Pixels at or above each threshold, from the histograms of true and false pixels.
    tp, fp = histogram.flip(1).cumsum(1).flip(1)
    positives, negatives = histogram.sum(1)
    fn, tn = positives - tp, negatives - fp
    precision = torch.where(tp + fp > 0, tp / (tp + fp).clamp(min=1), 1.0)
    recall = tp / positives.clamp(min=1)
    curves = [np.asarray(curve) for curve in (tp, fp, tn, fn, precision, recall)]
    writer.add_pr_curve_raw(
        "val/precision_recall", *curves, global_step=step, num_thresholds=len(curves[0])
    )
