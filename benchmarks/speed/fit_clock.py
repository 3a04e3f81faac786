"""`cellseg` with a clock: writes when each training step ended to `steps.json` of the run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning.pytorch as pl

from cellseg.cli import main


class Clock(pl.Callback):
    """Notes the time after each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(perf_counter())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        Path(trainer.default_root_dir, "steps.json").write_text(json.dumps(self.times))


if __name__ == "__main__":
    sys.exit(main(allow=["__main__"]))
