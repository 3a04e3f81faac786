"""What a checkpoint says of itself, read without running anything that it holds."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellseg.errors import InputError

# What must agree with the weights; a flag that says otherwise is refused.
ARCHITECTURE = ("model.out_channels", "model.base_channels", "model.depth")
NORMALISATION = ("data.percentiles",)


@dataclass(frozen=True)
class Stored:
    """The settings in a checkpoint.

    Attributes:
        settings: By the name of their flag, such as `model.base_channels`.
        split: Side to {pixel digest: sample id}; None where it holds none.
    """

    settings: dict[str, Any]
    split: dict[str, dict[str, str]] | None


def resolve(ckpt_path: str, default_root_dir: str) -> Path:
    """The file that `--ckpt_path` means; `last` is the newest last checkpoint below the root.

    Raises:
        InputError: It is an address, or there is no such file.
    """
    if "://" in ckpt_path:
        raise InputError(f"--ckpt_path {ckpt_path}: addresses are refused; download the file first")
    if ckpt_path == "last":
        found = list(Path(default_root_dir).rglob("last*.ckpt"))
        if not found:
            raise InputError(
                f"--ckpt_path last: no last checkpoint below {default_root_dir}; name the folder "
                "of the run with --trainer.default_root_dir"
            )
        return max(found, key=lambda path: path.stat().st_mtime)
    path = Path(ckpt_path)
    if not path.is_file():
        raise InputError(f"--ckpt_path {ckpt_path}: no such file")
    return path


def read(path: Path) -> Stored:
    """The settings and the split of a checkpoint.

    Raises:
        InputError: The file is damaged, holds more than data, or is of something else.
    """
    import torch

    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise InputError(f"--ckpt_path {path}: damaged (checksum of {damaged})")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"--ckpt_path {path}: refused, because it holds objects other than plain data"
        ) from error
    except (zipfile.BadZipFile, OSError, RuntimeError, EOFError, KeyError) as error:
        raise InputError(f"--ckpt_path {path}: not a checkpoint, or a damaged one") from error
    if not isinstance(content, dict):
        raise InputError(f"--ckpt_path {path}: not a checkpoint of cellseg")
    settings = {
        f"{group}.{name}": value
        for group, key in (
            ("model", "hyper_parameters"),
            ("data", "datamodule_hyper_parameters"),
            ("decode", "decoding"),
        )
        for name, value in content.get(key, {}).items()
    }
    lacking = [key for key in (*ARCHITECTURE, *NORMALISATION) if key not in settings]
    if lacking:
        layers = ", ".join(list(content.get("state_dict", {}))[:3])
        raise InputError(
            f"--ckpt_path {path}: not a checkpoint of cellseg: it lacks {', '.join(lacking)}"
            + (f" (its layers are {layers}, …)" if layers else "")
        )
    return Stored(settings, content.get("NucleiDataModule", {}).get("split"))
