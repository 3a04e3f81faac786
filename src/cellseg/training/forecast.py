"""How long a training takes."""

from __future__ import annotations

import logging
import math
import time

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Timer

from cellseg.task import SegmentationTask

log = logging.getLogger(__name__)


class Forecast(pl.Callback):
    """Says after the first epoch how long the others may take."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since, self._from = time.monotonic(), trainer.global_step
        self._said = False

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        done = trainer.global_step - self._from
        assert isinstance(pl_module, SegmentationTask)
        left = pl_module.total_steps - trainer.global_step
        if self._said or trainer.should_stop or not done or not 0 < left < math.inf:
            return
        self._said = True
        seconds = (time.monotonic() - self._since) / done * left
        granted = _granted(trainer)
        ends = ", of which --trainer.max_time leaves "
        limit = ends + _duration(granted) if granted < seconds else ""
        log.info(
            "%s steps are left: about %s%s, or less where validation stops getting better",
            f"{left:,.0f}", _duration(seconds), limit,
        )  # fmt: skip

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _granted(trainer) <= 0:
            log.info(
                "Stopped at step %d: --trainer.max_time is over; --ckpt_path last goes on with a "
                "longer one",
                trainer.global_step,
            )


def _granted(trainer: pl.Trainer) -> float:
    """The seconds that --trainer.max_time leaves; what a resumed run took before counts too."""
    timers = [each for each in trainer.callbacks if isinstance(each, Timer)]  # type: ignore[attr-defined]
    left = [timer.time_remaining() for timer in timers]
    return min((seconds for seconds in left if seconds is not None), default=math.inf)


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
