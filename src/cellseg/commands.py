"""The command line: flags, configs and a model on disk become the settings of one command."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentError
from collections.abc import Sequence
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from cellseg import runtime
from cellseg.arguments import (
    CKPT_PATH,
    DESCRIPTIONS,
    PredictHelpFormatter,
    bracket_lists,
    check,
    check_monitors,
    explain,
    find_configs,
    parser_options,
    refuse_empty,
)
from cellseg.choice import Choice, choose
from cellseg.data.datamodule import NucleiDataModule
from cellseg.errors import InputError
from cellseg.instances import Decoding
from cellseg.predict.writer import PredictionWriter
from cellseg.task import LOGGED, SegmentationTask
from cellseg.training.checkpoints import BestAndLast, Patience
from cellseg.training.dashboard import Dashboard
from cellseg.training.tuning import Tuning

# Modules that a config may name classes of, since a `class_path` is code that runs.
FENCE = ("cellseg", "lightning.pytorch", "lightning.fabric.plugins.environments", "torch.optim")
# Callbacks of a training, by the group of their flags.
TRAINING: dict[str, type[Callback]] = {
    "checkpoint": BestAndLast,
    "early_stopping": Patience,
    "dashboard": Dashboard,
    "tuning": Tuning,
}
# Our groups of flags, as far as they may take lists.
GROUPS = {"data": NucleiDataModule, "output": PredictionWriter}


class Commands(LightningCLI):
    """The parser of `cellseg` as a LightningCLI.

    It differs from Lightning's where that surprises: what the user gives wins over what a
    checkpoint stored, `last` is found in a new process, and each subcommand has the groups of
    flags that it uses. The methods stand in the order in which they are called.

    Attributes:
        choice: The model on disk that the command uses; None where `fit` starts from scratch, and
            where there are labels to score.
        given: The flags that the user gave, also by a config.
        by_script: Whether a script of the user's brings classes of its own.
    """

    by_script: bool
    choice: Choice | None = None
    given: set[str]

    def __init__(
        self, args: list[str], model_class: type[SegmentationTask], allow: Sequence[str]
    ) -> None:
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*FENCE, *allow])
        refuse_empty(args)
        super().__init__(
            model_class,
            NucleiDataModule,
            args=bracket_lists(find_configs(args), GROUPS),
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "default_root_dir": "runs",
                "max_epochs": 30,
                "log_every_n_steps": 10,
                "logger": True,
                "num_sanity_val_steps": 1,
                "use_distributed_sampler": False,  # `samplers.Share` divides the images
            },
            parser_kwargs=parser_options(),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The four commands, with the arguments of the trainer's methods that are not flags."""
        skipped = {"weights_only", "return_predictions", "verbose"}
        return {name: skip | skipped for name, skip in LightningCLI.subcommands().items()}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        self._subcommand_parsers = {}
        commands = parser.add_subcommands()
        for name, text in DESCRIPTIONS.items():
            subparser = self._prepare_subcommand_parser(Trainer, name, **kwargs[name])
            self._subcommand_parsers[name] = subparser
            commands.add_subcommand(name, subparser, help=text)
        self._parser("predict").formatter_class = PredictHelpFormatter

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        ckpt_path = parser._option_string_actions["--ckpt_path"]
        ckpt_path.help = CKPT_PATH[subcommand]
        ckpt_path.container.title = "The model"  # type: ignore[attr-defined]
        for group, callback in TRAINING.items():
            if subcommand == "fit":
                parser.add_lightning_class_args(callback, group)
            else:  # a config of a training may have it
                parser.add_argument(f"--{group}", type=dict, help=SUPPRESS)
        if subcommand != "fit":
            parser.add_class_arguments(Decoding, "decode")
            parser.add_argument(
                "--predict.runtime", type=runtime.RuntimeName, default="auto", help=runtime.HELP
            )
        if subcommand == "predict":
            parser.add_lightning_class_args(PredictionWriter, "output")
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The groups in the order in which people look for them."""
        parser.add_lightning_class_args(self._datamodule_class, "data")
        parser.add_lightning_class_args(self._model_class, "model")
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.set_defaults({f"trainer.{k}": v for k, v in self.trainer_defaults.items()})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            printed = [arg for arg in args if arg.startswith("--print_config")]
            self._apply_model(parser, [arg for arg in args if arg not in printed])
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            command = next((arg for arg in args if arg in DESCRIPTIONS), "fit")
            known = [action.dest for action in self._parser(command)._actions]
            raise InputError(explain(str(error), command, known)) from error
        command, choice = self.config.subcommand, self.choice
        config = self.config[command]
        check(command, config)
        if command == "fit" and not self.by_script:
            check_monitors(config, LOGGED)
        if command != "fit":
            for group in TRAINING:
                config.pop(group)
        if choice is not None:
            # Of a checkpoint, Lightning restores what tasks and callbacks of one's own have saved.
            is_checkpoint = choice.path.suffix != ".safetensors"
            restored = choice.resumes or (command != "fit" and is_checkpoint)
            config.ckpt_path = str(choice.path) if restored else None
        if command != "fit" or config.ckpt_path:
            config.model.pop("weights", None)

    def _apply_model(self, parser: LightningArgumentParser, args: list[str]) -> None:
        """Make what the model on disk says the default of each flag that the user left out."""
        given = parser.parse_args(args, defaults=False)
        flags, subparser = given[given.subcommand], self._parser(given.subcommand)
        self.given = set(flags.keys())
        for flag in ("data.preds_dir", "data.test_dir"):
            if given.subcommand == "validate" and flags.get(flag):
                raise InputError(f"--{flag} is for test, not for validate")
        if given.subcommand == "test" and flags.get("data.preds_dir"):
            if flags.get("ckpt_path"):
                raise InputError(
                    "--data.preds_dir scores what is there already; leave out --ckpt_path"
                )
            return
        root = flags.get("trainer.default_root_dir", self.trainer_defaults["default_root_dir"])
        self.choice = choose(given.subcommand, flags, str(root))
        if self.choice is not None:
            known = {action.dest for action in subparser._actions}
            defaults = self.choice.defaults
            subparser.set_defaults({key: defaults[key] for key in known & defaults.keys()})

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would let what the checkpoint stored override the user's flags."""
