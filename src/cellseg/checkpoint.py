"""Models on disk: what a checkpoint or a released model says of itself.

A checkpoint is read without running anything that it holds. A released model is a
`.safetensors` file of weights in half precision with a `.json` of all else beside it.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cellseg.adapt import DIAMETER
from cellseg.atomic import draft
from cellseg.errors import DAMAGE, InputError, few
from cellseg.instances import Decoding

# What must agree with the weights; a flag that says otherwise is refused.
ARCHITECTURE = ("model.out_channels", "model.base_channels", "model.depth")
FIXED = (*ARCHITECTURE, "data.percentiles")
SHIPPED = Path(str(files("cellseg"))) / "weights"


@dataclass(frozen=True)
class Stored:
    """A model on disk.

    Attributes:
        settings: By the name of their flag, such as `model.base_channels`.
        split: Side to {pixel digest: sample id}; None where it holds none.
        diameter: Median diameter in px of the nuclei it was trained on.
        weights: Name to tensor, for `SegmentationTask.load_state_dict`.
        ranges: Of the activations, see `nn.int8`; None where they were not measured.
    """

    settings: dict[str, Any]
    split: dict[str, dict[str, str]] | None
    diameter: float
    weights: dict[str, Tensor]
    ranges: dict[str, list[float]] | None = None

    @property
    def architecture(self) -> dict[str, Any]:
        """Arguments of `SegmentationTask` that the weights fit."""
        return {key.removeprefix("model."): self.settings[key] for key in ARCHITECTURE}

    @property
    def decoding(self) -> Decoding:
        """How its maps become nuclei."""
        levels = {k: v for k, v in self.settings.items() if k.startswith("decode.")}
        return Decoding(**{key.removeprefix("decode."): value for key, value in levels.items()})


def resolve(model: str, default_root_dir: str = ".") -> Path:
    """The file that `--ckpt_path` or `--model.weights` means.

    Args:
        model: A path, the name of a model that comes with the package, or `best` or `last`: the
            newest such checkpoint below the root.
        default_root_dir: The root.

    Raises:
        InputError: It is an address, or there is no such file.
    """
    if "://" in model:
        raise InputError(f"{model}: addresses are refused; download the model first")
    if model in ("best", "last"):
        newest = _newest(model, Path(default_root_dir))
        if newest is None:
            raise InputError(
                f"--ckpt_path {model}: no such checkpoint below {default_root_dir}; name the "
                "folder of the run with --trainer.default_root_dir"
            )
        return newest
    path = Path(model)
    if path.is_file():
        return path
    shipped = {path.stem: path for path in SHIPPED.glob("*.safetensors")}
    if model in shipped:
        return shipped[model]
    if path.is_dir():
        newest = _newest("best", path)
        found = f"its newest best checkpoint is {newest}" if newest else "no checkpoint is below it"
        raise InputError(f"{model}: a folder; {found}")
    raise InputError(f"{model}: no such file; the models in the package are {', '.join(shipped)}")


def _newest(kind: str, root: Path) -> Path | None:
    found = root.rglob(f"{kind}*.ckpt")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def read(path: Path) -> Stored:
    """A model that was trained or released.

    Raises:
        InputError: The file is damaged, holds more than data, or is of something else.
    """
    return _read_released(path) if path.suffix == ".safetensors" else _read_checkpoint(path)


def refuse_other(weights: Mapping[str, Tensor], module: nn.Module, name: str) -> None:
    """Refuse weights that a module has no place for, or that leave some of it without.

    Args:
        weights: Name to tensor.
        module: What is to take them.
        name: For the error.

    Raises:
        InputError: They differ in names or shapes.
    """
    own = module.state_dict()
    differing = sorted(
        key
        for key in own.keys() | weights.keys()
        if key not in own or key not in weights or own[key].shape != weights[key].shape
    )
    if differing:
        raise InputError(
            f"{name}: of another architecture: it differs in {few(differing)}; a network of your "
            "own needs the script that trained it"
        )


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace a checkpoint.

    Raises:
        OutputError: It cannot be written.
    """
    # Of a file that cannot be written, torch says so by a RuntimeError.
    buffer = BytesIO()
    torch.save(content, buffer)
    with draft(path) as name:
        name.write_bytes(buffer.getbuffer())


def _read_released(path: Path) -> Stored:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = path.read_bytes()
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if hashlib.sha256(content).hexdigest() != facts["sha256"]:
            raise InputError(f"{path}: damaged: not the sha256 in {path.stem}.json")
        weights = {name: value.float() for name, value in load(content).items()}
        diameter = facts.get("diameter") or DIAMETER
        return Stored(facts["settings"], facts["split"], diameter, weights, facts.get("ranges"))
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise InputError(f"{path}: no released model, or a damaged one ({error})") from error


def _read_checkpoint(path: Path) -> Stored:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        content = {} if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: refused, because it holds objects other than plain data"
        ) from error
    except (*DAMAGE, KeyError) as error:
        raise InputError(f"{path}: not a checkpoint, or a damaged one") from error
    if damaged:
        raise InputError(f"{path}: damaged (checksum of {damaged})")
    keys = {
        "model": "hyper_parameters",
        "data": "datamodule_hyper_parameters",
        "decode": "decoding",
        "weights": "state_dict",
        "state": "NucleiDataModule",
    }
    content = content if isinstance(content, dict) else {}
    parts = {part: content.get(key, {}) for part, key in keys.items()}
    if not all(isinstance(part, dict) for part in parts.values()):
        raise InputError(f"{path}: not a checkpoint of cellseg")
    weights, data = parts.pop("weights"), parts.pop("state")
    settings = {
        f"{part}.{name}": value for part, held in parts.items() for name, value in held.items()
    }
    lacking = [key for key in FIXED if key not in settings]
    if lacking:
        layers = ", ".join(list(weights)[:3])
        raise InputError(
            f"{path}: not a checkpoint of cellseg: it lacks {', '.join(lacking)}"
            + (f" (its layers are {layers}, …)" if layers else "")
        )
    diameter = data.get("diameter") or DIAMETER
    return Stored(settings, data.get("split"), diameter, weights, content.get("ranges"))
