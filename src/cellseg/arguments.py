"""What people type, made into what the parser takes, and its errors into what people read."""

from __future__ import annotations

import difflib
import json
import re
import shlex
from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import DefaultHelpFormatter, Namespace

from cellseg import __version__
from cellseg.errors import InputError

EXAMPLES = {
    "fit": "cellseg fit --config nuclei.yaml --data.root stage1_train.zip",
    "validate": "cellseg validate --ckpt_path best.ckpt --data.root stage1_train.zip",
    "test": "cellseg test --ckpt_path best.ckpt --data.root stage1_train.zip",
    "predict": "cellseg predict --data.predict_dir images",
}
DESCRIPTIONS = {
    "fit": "Train on annotated images.",
    "validate": "Score a model on the validation side of its split.",
    "test": "Score a model on the test side of its split, or on new annotated images.",
    "predict": "Find the nuclei of every image in a folder, with nuclei-1 or a model of yours.",
}

# Lightning's own texts are of its methods.
CKPT_PATH = {
    "fit": "Checkpoint to go on from: a file, or `last`, the newest one below "
    "--trainer.default_root_dir.",
    "validate": "The model: a file, `nuclei-1`, or `best` or `last` of the runs below "
    "--trainer.default_root_dir; by default nuclei-1.",
}
CKPT_PATH["predict"] = CKPT_PATH["validate"]
CKPT_PATH["test"] = f"{CKPT_PATH['validate']} A folder scores the best of each fold below it."
# By group, what `predict` uses of the flags that it shares with `fit`.
PREDICT: dict[str, set[str]] = {
    "data": {
        *("predict_dir", "channel", "plane", "invert", "diameter", "pixel_size"),
        *("include", "exclude", "shard", "percentiles", "num_workers", "cache_dir"),
    },
    "model": set(),
    "trainer": {
        *("accelerator", "devices", "strategy", "num_nodes", "precision"),
        *("enable_progress_bar", "default_root_dir"),
    },
}
# What the parser calls the types of values.
TYPES = {
    **{"bool": "true or false", "float": "a number", "int": "a whole number", "str": "a text"},
    "tuple": "a list",
}


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Leaves the lines of the examples as they are."""


class PredictHelpFormatter(HelpFormatter):
    """Shows what `predict` uses: it takes the configs of trainings too, so it knows all flags."""

    def add_argument(self, action: Action) -> None:
        group, _, name = action.dest.partition(".")
        if group not in PREDICT or name in PREDICT[group]:
            super().add_argument(action)


def parser_options() -> dict[str, Any]:
    """What the parser is made with, and by the name of a subcommand, what its own is."""
    options: dict[str, Any] = {
        "exit_on_error": False,
        "formatter_class": HelpFormatter,
        "allow_abbrev": False,  # a shortened flag is a typo
    }
    own = {
        command: {
            **options,
            "usage": f"cellseg {command} [--config FILE] [--GROUP.NAME VALUE] ...",
            "description": f"{text}\n\n  {EXAMPLES[command]}",
        }
        for command, text in DESCRIPTIONS.items()
    }
    own["predict"]["epilog"] = "A config of fit is accepted too; what is not used here is ignored."
    examples = "\n".join(f"  {example}" for example in EXAMPLES.values())
    description = f"Find cell nuclei in microscope images.\n\n{examples}"
    return {
        **options,
        "prog": "cellseg",
        "version": __version__,
        "description": description,
        **own,
    }


def find_configs(args: Sequence[str]) -> list[str]:
    """Put the configs first, so that flags win over them wherever they stand.

    Each that is no file here becomes the packaged one of that name.

    Raises:
        InputError: A config holds no settings, or is no YAML.
    """
    configs, others = [], []
    rest = iter(args)
    for arg in rest:
        if arg in ("--config", "-c"):
            configs += [arg, *(_config(value) for value in islice(rest, 1))]
        elif arg.startswith("--config="):
            configs.append(f"--config={_config(arg.removeprefix('--config='))}")
        else:
            others.append(arg)
    return [*others[:1], *configs, *others[1:]]


def _config(path: str) -> str:
    """The file of a config; what the parser would refuse without naming it is refused here."""
    import yaml

    name = path.removeprefix("configs/")
    packaged = _configs() / name
    if not Path(path).exists() and Path(name).name == name and packaged.is_file():
        return str(packaged)
    if not Path(path).is_file():
        return path
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: a config that is not in UTF-8; save it anew in that encoding "
            "(in PowerShell: --print_config | Out-File -Encoding utf8 run.yaml)"
        ) from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: a config holds groups of settings, as data: or model:")
    return path


def _configs() -> Path:
    installed = Path(str(files("cellseg"))) / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs"


def bracket_lists(args: Sequence[str], groups: Mapping[str, type]) -> list[str]:
    """Write `a,b` as the `["a", "b"]` that the parser wants, which shells would mangle.

    Args:
        args: The command line.
        groups: Group of flags to the class that takes them; its annotations say which of the
            flags are lists.
    """
    kinds = {
        f"--{group}.{name}": str(hint)
        for group, owner in groups.items()
        for name, hint in get_type_hints(owner.__init__).items()  # type: ignore[misc]
        if re.search(r"\b(list|tuple)\[", str(hint))
    }
    done: list[str] = []
    for arg in args:
        flag, equals, value = arg.partition("=") if arg.startswith("--") else ("", "", arg)
        owner = flag if equals else (done[-1] if done else "")
        if owner in kinds and value and not _is_list(value):
            words = [word.strip() for word in value.split(",")]
            value = json.dumps(words) if "list[str]" in kinds[owner] else f"[{','.join(words)}]"
        done.append(flag + equals + value)
    return done


def _is_list(value: str) -> bool:
    """Whether a value is a list already; shell patterns may have brackets at both ends."""
    import yaml

    try:
        return isinstance(yaml.safe_load(value), list)
    except (yaml.YAMLError, ValueError):  # ValueError: of what looks like a date
        return value[0] + value[-1] == "[]" and "," in value  # the parser will say what is wrong


def refuse_empty(args: Sequence[str]) -> None:
    """Refuse values like those of a shell variable that is not set: a path would mean `.`.

    Raises:
        InputError: A flag has an empty value.
    """
    for before, arg in zip(["", *args], args, strict=False):
        flag, equals, value = arg.partition("=")
        if flag.startswith("--") and equals and not value:
            before, arg = flag, ""
        if before.startswith("--") and not arg:
            raise InputError(f"{before}: the value is empty; give one, or leave the flag out")


def check(command: str, settings: Namespace) -> None:
    """Refuse what the parser lets through and Lightning fails at.

    Args:
        command: The subcommand.
        settings: Its own.

    Raises:
        InputError: A value is of no use.
    """
    for group in ("data", "model", "trainer"):
        if not isinstance(settings[group], Namespace):
            raise InputError(f"{group}: {settings[group]} is no group of settings; see --help")
    trainer, seed = settings.trainer, settings.seed_everything
    if trainer.overfit_batches:
        raise InputError(
            "--trainer.overfit_batches draws its own crops; a few images and --data.augment 0 show "
            "the same"
        )
    if trainer.accumulate_grad_batches < 1:
        raise InputError("--trainer.accumulate_grad_batches: must be 1 or more")
    if trainer.check_val_every_n_epoch is not None and trainer.check_val_every_n_epoch < 1:
        raise InputError("--trainer.check_val_every_n_epoch: must be 1 or more, or null")
    if trainer.val_check_interval == 0:
        raise InputError("--trainer.val_check_interval 0: must be more, or null")
    stage = {"fit": "train", "validate": "val"}.get(command, command)
    limit = f"limit_{stage}_batches"
    if trainer.get(limit) == 0:
        raise InputError(f"--trainer.{limit} 0: leaves no image to {command}; leave the flag out")
    if trainer.enable_checkpointing is False and command == "fit":
        raise InputError(
            "--trainer.enable_checkpointing false: fit keeps its best and last checkpoint; leave "
            "the flag out"
        )
    if not isinstance(seed, bool) and not 0 <= seed < 2**32:
        raise InputError(f"--seed_everything {seed}: must be a number from 0 to 2**32 - 1")


def check_monitors(settings: Namespace, logged: Sequence[str]) -> None:
    """Refuse to watch a value that never comes, and to take the worst for the best.

    Args:
        settings: Of `fit`.
        logged: The names of all values that come.

    Raises:
        InputError: A monitor is none of them, or has the wrong mode.
    """
    for group in ("checkpoint", "early_stopping"):
        monitor = settings[group].monitor
        if monitor not in logged:
            near = difflib.get_close_matches(monitor.lower(), logged, 1, cutoff=0)[0]
            raise InputError(
                f"--{group}.monitor {monitor}: no such value is logged; did you mean {near}? "
                f"There are {', '.join(logged)}"
            )
        best = "min" if monitor.endswith("/loss") else "max"
        if settings[group].mode != best:
            raise InputError(f"--{group}.monitor {monitor}: needs --{group}.mode {best}")


def explain(message: str, command: str, known: Sequence[str]) -> str:
    """An error of the parser, with the nearest right word where a word is unknown.

    Args:
        message: The parser's.
        command: The subcommand.
        known: Its settings.
    """
    if choice := re.search(r"invalid choice: '(.+?)' \(", message):
        near = difflib.get_close_matches(choice[1], DESCRIPTIONS, 1)
        better = near[0] if near else f"predict --data.predict_dir {shlex.quote(choice[1])}"
        return f"{choice[1]}: no such command. Did you mean cellseg {better}?"
    if fenced := re.search(r"key \"(\S+)\".*Importing '(\S+)' is not", message, re.DOTALL):
        return (
            f"{fenced[1]}: {fenced[2]} is not of Lightning, torch.optim or cellseg, whose classes "
            "a config may name; for classes of your own see docs/extending.md"
        )
    if no_class := re.search(r"key \"(trainer\S+)\".* path string: (\S+)", message, re.DOTALL):
        return f"{no_class[1]}: there is no class {no_class[2]}"
    if no_list := re.search(r"key \"(\S+)\".*: \[list\[.*type: <class 'str", message, re.DOTALL):
        return f"{no_list[1]}: must be a list: [a, b] in a config, a,b on the command line"
    if no_config := re.search(r"\"config\": File does not exist: '(.+?)'", message):
        shipped = sorted(path.name for path in _configs().glob("*.yaml"))
        return f"--config {no_config[1]}: no such file; with cellseg come {', '.join(shipped)}"
    wrong = re.search(
        r"key \"(\S+)\":\s+(?:Expected |.*Subtypes: )(.+?)"
        r"(?:\. Got|\s+Errors:.*Given) value: (.*)",
        message,
        re.DOTALL,
    )
    if wrong:
        return f"{wrong[1]}: must be {_kinds(wrong[2])}, not {wrong[3]}"
    # A path may have spaces; what begins with a dash is not part of it.
    unknown = re.search(r"unrecognized arguments: (-\S+|.+?(?= -|$))|[Oo]ption '(\S+)'", message)
    if not unknown:
        return message
    word = unknown[1] or unknown[2]
    if unknown[1] and not word.startswith("-"):
        flag = "--data.predict_dir" if command == "predict" else "--data.root"
        return f"{word}: a value without a name. Did you mean {flag} {shlex.quote(word)}?"
    key = word.lstrip("-").split("=")[0]
    if key.removeprefix(f"{command}.") in known:
        return f"{key}: in a config, data:, model: and trainer: stand on top, without {command}:"
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{key}: no such setting of {command}{hint}"


def explain_class(message: str) -> str:
    """Why a class that a config names cannot be made, without the other types that might be."""
    reason = re.search(r"Problem with given class_path '(\S+)':\s+(.+)", message)
    return f"{reason[1]}: {reason[2]}" if reason else message


def _kinds(types: str) -> str:
    """Types as the parser names them, in words."""
    words: list[str] = []
    for name, literal in re.findall(r"<class '(\w+)'>|Literal\[(.*?)\]", types):
        words += literal.replace("'", "").split(", ") if literal else [TYPES.get(name, name)]
    return " or ".join(word for word in dict.fromkeys(words) if word != "NoneType") or types
