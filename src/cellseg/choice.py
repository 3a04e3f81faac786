"""Which model a command uses."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cellseg.checkpoint import FIXED, Stored, read, resolve
from cellseg.errors import InputError

DEFAULT = "nuclei-1"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The model that a command uses.

    Attributes:
        name: As the user named it; of `best` and `last` the path.
        path: Its file.
        stored: What the file says.
        resumes: Whether a training goes on from it.
        defaults: What takes the place of the defaults of flags.
        folds: Several checkpoints of equal architecture, whose test sides make one report.
    """

    name: str
    path: Path
    stored: Stored
    resumes: bool
    defaults: Mapping[str, Any]
    folds: Mapping[Path, Stored] = field(default_factory=dict)


def choose(command: str, flags: Mapping[str, Any], default_root_dir: str) -> Choice | None:
    """The model that a command is to use; None where `fit` starts from scratch.

    Args:
        command: The subcommand.
        flags: What the user gave.
        default_root_dir: Where runs are.

    Raises:
        InputError: There is no such model, it cannot be read, or a flag contradicts it.
    """
    named = flags.get("ckpt_path") or flags.get("model.weights")
    if named is None:
        if command == "fit":
            return None
        named = DEFAULT
        log.info("Model: %s, which comes with cellseg", named)
    name = str(named)
    is_folder = name not in ("best", "last", DEFAULT) and Path(name).is_dir()
    folds = best_of_runs(Path(name)) if command == "test" and is_folder else {}
    path = next(iter(folds)) if folds else resolve(name, default_root_dir)
    resumes = command == "fit" and bool(flags.get("ckpt_path"))
    if resumes and path.suffix == ".safetensors":
        raise InputError(
            f"--ckpt_path {name}: holds no training to go on with; --model.weights {name} starts "
            "from it"
        )
    stored = folds[path] if folds else read(path)
    if name in ("best", "last"):
        name = str(path)
        log.info("Model: %s", name)
    elif command != "fit" and not flags.get("ckpt_path") and flags.get("model.weights"):
        log.info("Model: %s, by --model.weights; --ckpt_path names another", name)
    for key in FIXED:
        asked, kept = flags.get(key), stored.settings[key]
        if asked is not None and asked != (tuple(kept) if isinstance(asked, tuple) else kept):
            raise InputError(
                f"--{key} {_plain(asked)} contradicts {path}, which was trained with "
                f"{_plain(kept)}; leave the flag out"
            )
    # A training that starts anew has a learning rate and so on of its own.
    starts_anew = command == "fit" and not resumes
    defaults = {key: stored.settings[key] for key in (FIXED if starts_anew else stored.settings)}
    return Choice(name, path, stored, resumes, defaults, folds)


def best_of_runs(folder: Path) -> dict[Path, Stored]:
    """The best checkpoints below a folder, such as those of the folds of a small set.

    Of their splits, the test sides lack what all of them have there: a training that starts from
    weights keeps the sides of what those were trained on.

    Raises:
        InputError: There are none, or they do not belong together.
    """
    runs = {path: read(path) for path in sorted(folder.rglob("best*.ckpt"))}
    if not runs:
        raise InputError(f"--ckpt_path {folder}: no best checkpoint below it")
    first, *others = runs
    for path in others:
        differing = [k for k in FIXED if runs[path].settings[k] != runs[first].settings[k]]
        if differing:
            raise InputError(
                f"--ckpt_path {folder}: {first} and {path} were trained with another "
                f"{differing[0]}; move one of them away"
            )
    sides = {path: stored.split or {} for path, stored in runs.items()}
    tests = {}
    for path, split in sides.items():  # of images on more than one side, the others come first
        used = {*split.get("train", {}), *split.get("val", {})}
        tests[path] = {k: name for k, name in split.get("test", {}).items() if k not in used}
    inherited = set.intersection(*map(set, tests.values())) if others else set()
    if inherited:
        log.info("%d test images are those of all runs and are left out", len(inherited))
    tested: dict[str, Path] = {}
    for path, test in tests.items():
        own = test.keys() - inherited
        same = next((tested[digest] for digest in own if digest in tested), None)
        if others and not own:
            same = next(other for other in runs if other != path)
        if same:
            raise InputError(
                f"--ckpt_path {folder}: {same} and {path} have test images in common; move one of "
                "them away"
            )
        tested.update(dict.fromkeys(own, path))
        split = {**sides[path], "test": {digest: test[digest] for digest in own}}
        runs[path] = replace(runs[path], split=split)
    return runs


def _plain(value: Any) -> str:
    return ",".join(f"{v:g}" for v in value) if isinstance(value, list | tuple) else str(value)
