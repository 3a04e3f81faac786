"""Which model a command uses."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cellseg.checkpoint import FIXED, Stored, read, resolve
from cellseg.errors import InputError
from cellseg.scoring.folds import best_of_runs

DEFAULT = "nuclei-1"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The model that a command uses.

    Attributes:
        name: As the user named it; of `best` and `last` the path.
        path: Its file.
        stored: What the file says.
        whole: Whether Lightning loads it as a checkpoint; else the task takes its weights.
        starts_anew: Whether a new training starts from it.
        folds: Several checkpoints of equal architecture, whose test sides make one report.
    """

    name: str
    path: Path
    stored: Stored
    whole: bool
    starts_anew: bool
    folds: Mapping[Path, Stored] = field(default_factory=dict)

    def defaults(self) -> dict[str, Any]:
        """What takes the place of the defaults of flags."""
        if self.starts_anew:
            # A training has a learning rate and so on of its own.
            return {key: self.stored.settings[key] for key in FIXED}
        return self.stored.settings


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
    stored = folds[path] if folds else read(path)
    if name in ("best", "last"):
        name = str(path)
        log.info("Model: %s", name)
    for key in FIXED:
        asked, kept = flags.get(key), stored.settings[key]
        if asked is not None and asked != (tuple(kept) if isinstance(asked, tuple) else kept):
            raise InputError(
                f"--{key} {_plain(asked)} contradicts {path}, which was trained with "
                f"{_plain(kept)}; leave the flag out"
            )
    starts_anew = command == "fit" and not flags.get("ckpt_path")
    whole = path.suffix != ".safetensors" and not starts_anew
    return Choice(name, path, stored, whole, starts_anew, folds)


def _plain(value: Any) -> str:
    return ",".join(f"{v:g}" for v in value) if isinstance(value, list | tuple) else str(value)
