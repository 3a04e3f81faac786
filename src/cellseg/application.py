"""What each command does, once its settings are known; see `commands`."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from cellseg import __version__, runtime
from cellseg.arguments import explain_class
from cellseg.commands import Commands
from cellseg.cores import use_granted_cores
from cellseg.data.datamodule import NucleiDataModule
from cellseg.data.digests import digest_of
from cellseg.errors import InputError, OutputError
from cellseg.failures import written_below
from cellseg.messages import quieten
from cellseg.predict.run import Run
from cellseg.scoring.folds import score_folds
from cellseg.scoring.report import Report, score_folders
from cellseg.signals import EXIT_CODES
from cellseg.task import SegmentationTask
from cellseg.training.allocator import keep_freed_memory
from cellseg.training.checkpoints import KeepConfigAndSplit, WholeCheckpoints
from cellseg.training.forecast import Forecast

log = logging.getLogger(__name__)


def run(
    args: Sequence[str], model_class: type[SegmentationTask] | None, allow: Iterable[str]
) -> int:
    """Parse and carry out one command; see `cli.main`."""
    quieten()
    use_granted_cores()
    try:
        command = Application([*args], model_class or SegmentationTask, [*allow])
        if dist.is_initialized():
            dist.destroy_process_group()  # else its threads may abort a process that ends
        return command.exit_code
    except SIGTERMException:
        return EXIT_CODES["SIGTERM"]
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # which Lightning has caught
            return EXIT_CODES["SIGINT"]
        raise


class Application(Commands):
    """The LightningCLI: making one parses the arguments and carries out their command.

    The methods stand in the order in which Lightning calls them.
    """

    model: SegmentationTask
    datamodule: NucleiDataModule

    def __init__(
        self, args: list[str], model_class: type[SegmentationTask], allow: Sequence[str]
    ) -> None:
        self.by_script = model_class is not SegmentationTask or bool(allow)
        program = ["python", sys.argv[0]] if self.by_script else ["cellseg"]
        self.command = {"command": shlex.join([*program, *args]), "version": __version__}
        self.exit_code = 0
        super().__init__(args, model_class, allow)

    def before_instantiate_classes(self) -> None:
        settings = self.config[self.subcommand]
        # The config of a run is part of its log; without a log there is nowhere to keep it. One
        # that goes on may have it, with the weights that it started from.
        has_one = self._resumed and (self._resumed.parent / "config.yaml").is_file()
        keep = self.subcommand == "fit" and settings.trainer.logger and not has_one
        self.save_config_callback = KeepConfigAndSplit if keep else None

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # a class refuses its arguments, or lacks a package
            raise InputError(explain_class(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self.config[self.subcommand].trainer
        ours: list[Callback] = []  # Lightning adds them to those that the user names
        self.trainer_defaults["callbacks"] = ours
        if self.subcommand == "fit":
            ours.append(Forecast())
        else:
            self.runtime = runtime.Runtime(self.config[self.subcommand].predict.runtime)
            ours.append(self.runtime)
        if self.subcommand in ("validate", "test"):
            self.report = Report()
            ours.append(self.report)
        if settings.logger is True:
            kwargs["logger"] = self._logger(settings.default_root_dir)
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # else it is the user's
            trainer.strategy.checkpoint_io = WholeCheckpoints()
        return trainer

    @property
    def _resumed(self) -> Path | None:
        """The folder of the checkpoint that `fit` goes on from, where the run is below its root."""
        if self.subcommand != "fit" or self.choice is None or not self.choice.resumes:
            return None
        folder = _absolute(self.choice.path).parent
        root = _absolute(self.config.fit.trainer.default_root_dir)
        return folder if root in folder.parents else None

    def _logger(self, root: str) -> TensorBoardLogger | Literal[False]:
        if self.subcommand == "predict":  # it would litter its folder; a config of fit has one
            return False
        if self.subcommand != "fit":
            return TensorBoardLogger(
                root, name=None, version=self.subcommand, default_hp_metric=False
            )
        version = None
        if self._resumed and self._resumed.parents[1] == _absolute(root) / "lightning_logs":
            version = self._resumed.parent.name
        # Lightning's own choice of logger also draws a metric that is always -1.
        return TensorBoardLogger(root, version=version, default_hp_metric=False)

    def after_instantiate_classes(self) -> None:
        if self.choice is not None:
            self.datamodule.trained_split = self.choice.stored.split
            self.model.adopt(self.choice.stored, self.choice.name)
        if self.subcommand != "fit":
            self.model.decoding = self._get(self.config_init, "decode")
            reading = self.datamodule.reading
            self.model.adaptation = reading.invert, reading.diameter

    def _run_subcommand(self, subcommand: str) -> None:
        root = Path(self.trainer.default_root_dir)
        with written_below(root.absolute()):
            if subcommand == "test" and self.datamodule.preds_dir:
                score_folders(self.datamodule, root, self.command)
            else:
                super()._run_subcommand(subcommand)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand) | {"weights_only": True}
        if subcommand in ("validate", "test"):
            kwargs["verbose"] = False  # `Report` prints a table
        # Kept predictions would fill the memory.
        return kwargs | ({"return_predictions": False} if subcommand == "predict" else {})

    def before_fit(self) -> None:
        if self.datamodule.test_dir or self.datamodule.preds_dir:
            log.warning("--data.test_dir and --data.preds_dir are for test; fit does without them")
        self._get(self.config_init, "checkpoint").resumed = self._resumed
        keep_freed_memory()
        dashboard = self._get(self.config_init, "dashboard")
        dashboard.config_text = self._config_text()
        settings = json.loads(self._config_text(format="json"))
        dashboard.settings = _named("model", settings["model"]) | _named("data", settings["data"])

    def after_fit(self) -> None:
        tuning = self._get(self.config_init, "tuning")
        if not tuning.trained:
            limit = "max_steps" if self.trainer.max_steps >= 0 else "max_epochs"
            limit = "max_time" if self.trainer.should_stop else limit
            log.info("Trained to its end already; a higher --trainer.%s goes on", limit)
            tuning.make_up(self.trainer, self.model)

    def before_validate(self) -> None:
        assert self.choice is not None
        model = {"model": self.choice.name}
        if not self.choice.folds:
            model["model_sha256"] = digest_of(self.choice.path)
        self.report.about = {**model, **self.command, "decoding": asdict(self.model.decoding)}

    def test(self, **kwargs: Any) -> None:
        """In place of the trainer's own: the test of one model, or of folds."""
        if self.choice is not None and self.choice.folds:
            task, data, report = self.model, self.datamodule, self.report
            score_folds(self.choice.folds, self.trainer, task, data, report, self.given)
        else:
            self.trainer.test(**kwargs)

    def after_validate(self) -> None:
        self.report.write(self.trainer)

    before_test, after_test = before_validate, after_validate

    def before_predict(self) -> None:
        writer = self._get(self.config_init, "output")
        source, shard = self.datamodule.search.source, self.datamodule.search.shard
        if source is None:
            raise InputError("predict needs images: --data.predict_dir PATH")
        if writer.dir is None:
            whole = source.resolve() if source.name in ("", "..") else source
            name = whole.stem if whole.is_file() else whole.name
            writer.dir = whole.parent / f"{name}_cellseg"
        self.datamodule.left_to_do = writer.left_to_do
        assert self.choice is not None
        model = digest_of(self.choice.path)
        computed_by = self.runtime.choose(self.trainer, self.model)
        writer.run = Run(
            dir=writer.dir,
            formats=writer.formats,
            about={
                **self.command,
                "model": self.choice.name,
                "model_sha256": model,
                "runtime": computed_by,
                "settings": json.loads(self._config_text(format="json")),
            },
            settings={
                "model": model,
                "version": __version__,
                "precision": self.trainer.precision,
                "runtime": computed_by,
                # Measured again, they make another network of the same weights.
                **({"ranges": self.model.ranges} if computed_by == "int8" else {}),
                **_named("decode", asdict(self.model.decoding)),
                **_named("data", asdict(self.datamodule.reading)),
                "output.formats": sorted(writer.formats),
                "output.expand": writer.expand,
            },
            shard=shard,
            rank=self.trainer.global_rank,
        )

    def after_predict(self) -> None:
        writer = self._get(self.config_init, "output")
        stopped = writer.processes.leave()
        # Launchers end all processes when one of them fails, so only the first one reports.
        if not writer.processes.first:
            return
        if stopped and stopped not in EXIT_CODES:
            raise OutputError(stopped)
        failed = writer.run.finish(self.datamodule.files)
        self.exit_code = EXIT_CODES[stopped] if stopped else 1 if failed else 0

    def _config_text(self, format: str = "yaml") -> str:
        parser, config = self._parser(self.subcommand), self.config[self.subcommand]
        return str(parser.dump(config, skip_none=False, format=format))


def _absolute(path: Path | str) -> Path:
    """Unlike `Path.absolute` without `..`, which hides in which folder a path lies."""
    return Path(os.path.abspath(path))


def _named(group: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{group}.{name}": value for name, value in values.items()}
