"""The folds of a small set: several checkpoints, whose test sides make one report."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from lightning.pytorch import Trainer

from cellseg.checkpoint import Stored
from cellseg.data.datamodule import NucleiDataModule
from cellseg.errors import InputError
from cellseg.scoring.report import Report
from cellseg.task import SegmentationTask


def score_folds(
    folds: Mapping[Path, Stored],
    trainer: Trainer,
    task: SegmentationTask,
    datamodule: NucleiDataModule,
    report: Report,
    given: Collection[str],
) -> None:
    """Each checkpoint with its decoding on its own test side.

    Args:
        folds: See `choice.best_of_runs`.
        trainer: Calls the report.
        task: Becomes each of them.
        datamodule: Loads the images.
        report: Is made of all of them.
        given: The flags that the user gave, which win over what the checkpoints stored.

    Raises:
        InputError: Other images or another split are asked for.
    """
    tested = {digest for stored in folds.values() for digest in (stored.split or {})["test"]}
    source, samples = datamodule.annotated()
    unknown = not any(sample.digest() in tested for sample in samples)
    divided = datamodule.recipe.asked
    if datamodule.test_dir or divided or unknown:
        raise InputError(
            f"--ckpt_path {report.about['model']}: its runs score what each of them tested on"
            + (f", which is nothing of {source}" if unknown else "")
            + ("; a config of theirs needs --data.folds 0 --data.fold 0 here" if divided else "")
            + "; for other images or another split name one checkpoint"
        )
    now = asdict(task.decoding)
    asked = {name: value for name, value in now.items() if f"decode.{name}" in given}
    decodings = {path: replace(stored.decoding, **asked) for path, stored in folds.items()}
    if len(set(decodings.values())) > 1:
        report.about["decoding"] = "of each checkpoint"
    for path, stored in folds.items():
        datamodule.trained_split, datamodule.sides = stored.split, {}
        task.adopt(stored, str(path))
        task.decoding = decodings[path]
        trainer.test(task, datamodule, ckpt_path=path, weights_only=True, verbose=False)
