"""What is kept of a training, and when it ends."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from cellseg.atomic import as_csv, write_text
from cellseg.checkpoint import write
from cellseg.errors import InputError, counted
from cellseg.resuming import moved, rewind

log = logging.getLogger(__name__)


class BestAndLast(ModelCheckpoint):
    """Keeps the best and the last checkpoint, the last one also when training is stopped.

    Args:
        monitor: The logged value that decides which is best.
        mode: `max` or `min`.
        every_n_epochs: How often to look.
    """

    def __init__(
        self, monitor: str = "val/map", mode: str = "max", every_n_epochs: int = 1
    ) -> None:
        if every_n_epochs < 1:
            raise InputError(f"--checkpoint.every_n_epochs {every_n_epochs}: must be positive")
        super().__init__(
            monitor=monitor,
            mode=mode,
            filename="best",
            every_n_epochs=every_n_epochs,
            # The slash of the metric's name would make a folder.
            auto_insert_metric_name=False,
        )
        self._buffers: dict[str, Tensor] = {}  # as they were before the batches of a step
        self._first_step: int | None = None  # of this run; None before it trains
        # Folder of the checkpoint of a run that goes on; set by `application`.
        self.resumed: Path | None = None

    @property
    def state_key(self) -> str:
        # Lightning's also has `every_n_epochs`: a run that changes it would forget its best.
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        best = state_dict["best_model_path"]
        if self.resumed is not None and (not best or (self.resumed / Path(best).name).is_file()):
            # Elsewhere, as another logger would have it, or where the same folder is named in
            # another way or was moved, it would forget which was the best.
            self.dirpath = str(self.resumed)
            state_dict = moved(state_dict, self.resumed)
        super().load_state_dict(state_dict)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._first_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._buffers = {name: value.clone() for name, value in pl_module.named_buffers()}

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == trainer.max_steps:
            # Lightning validates a run that is told to stop, but not one whose steps are done.
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        # Lightning's own `save_last` is the last that was also a best one.
        if _is_sound(pl_module):
            self._save_last(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        # Lightning's own `save_on_exception` would also overwrite the best with this one. Of
        # several processes only those stopped by a signal are known to come here together.
        together = trainer.world_size == 1 or isinstance(exception, SIGTERMException)
        # A run that cannot go on, as with another optimiser, has nothing new to keep.
        if self._first_step in (None, trainer.global_step) or trainer.state.fn != "fit":
            return
        if together and _is_sound(pl_module):
            if rewind(trainer):
                # Batch normalisation has counted the batches that come again.
                pl_module.load_state_dict(self._buffers, strict=False)
            self._save_last(trainer)
            log.warning("Saved %s; the same command with --ckpt_path last goes on", self._last)

    @property
    def _last(self) -> Path:
        return Path(self.dirpath or "") / "last.ckpt"

    def _save_last(self, trainer: pl.Trainer) -> None:
        if self.dirpath and not getattr(trainer, "fast_dev_run", False):
            trainer.save_checkpoint(self._last)


class WholeCheckpoints(TorchCheckpointIO):
    """Saves a checkpoint under its name when all of it is there.

    Lightning's own writes elsewhere and, where that is another disk, copies over what was there.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        write(Path(path), checkpoint)


def _is_sound(pl_module: pl.LightningModule) -> bool:
    """Whether there is anything to go on with: a loss that overflows leaves no number behind."""
    return all(bool(value.isfinite().all()) for value in pl_module.parameters())


class Patience(EarlyStopping):
    """Ends training when the score has not risen for a while.

    Args:
        monitor: The logged value to watch.
        mode: `max` or `min`.
        patience: Validations without a rise after which training ends.
        min_delta: What counts as a rise.
    """

    def __init__(
        self,
        monitor: str = "val/map",
        mode: str = "max",
        patience: int = 20,
        min_delta: float = 0.0,
    ) -> None:
        # Not strict, for runs that skip validation.
        super().__init__(monitor, min_delta, patience, mode=mode, strict=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})  # the user's wins

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.wait_count >= self.patience:
            log.info(
                "Stopped at step %d: no better %s in %s; a higher --early_stopping.patience waits "
                "longer",
                trainer.global_step, self.monitor, counted(self.wait_count, "validations"),
            )  # fmt: skip


class KeepConfigAndSplit(SaveConfigCallback):
    """Keeps the config of a run and, as a table that `--data.split` takes, its split."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        folder = trainer.log_dir  # all processes have to ask for it
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        sides = trainer.datamodule.sides  # type: ignore[attr-defined]
        rows = [(sample.id, side) for side, samples in sides.items() for sample in samples]
        write_text(Path(folder or "") / "split.csv", as_csv([("image_id", "split"), *rows]))
