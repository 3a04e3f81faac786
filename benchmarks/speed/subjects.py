"""What is measured: networks of several widths, and images with many nuclei."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

import cellseg
from cellseg.checkpoint import Stored, read, resolve
from cellseg.data.cache import CachedImage, default_cache_dir, prepare
from cellseg.data.dataset import to_input
from cellseg.data.folders import find_samples, open_tree
from cellseg.data.groups import dsb2018
from cellseg.data.synthetic import generate
from cellseg.errors import InputError
from cellseg.model import Model
from cellseg.task import SegmentationTask

SHIPPED = "nuclei-1"
SHIPPED_WIDTH = 16


def model(width: int, folder: Path) -> str:
    """What `--ckpt_path` takes for a model of so many base channels.

    Wider ones than nuclei-1 are made of it and give the same maps, so that what follows the
    network has the same to do: no channel of nuclei-1 reads any of the new ones.
    """
    if width == SHIPPED_WIDTH:
        return SHIPPED
    narrow = read(resolve(SHIPPED))
    settings = {**narrow.settings, "model.base_channels": width}
    content = save({name: value.contiguous() for name, value in widened(narrow, width).items()})
    facts = {"sha256": hashlib.sha256(content).hexdigest(), "settings": settings, "split": None}
    path = folder / f"wide-{width}.safetensors"
    path.write_bytes(content)
    path.with_suffix(".json").write_text(json.dumps({**facts, "diameter": narrow.diameter}))
    return str(path)


def int8() -> Model | None:
    """nuclei-1 in int8, or None where it lacks the ranges or OpenVINO is not installed."""
    try:
        return cellseg.load(SHIPPED, "int8")
    except InputError:
        return None


def widened(narrow: Stored, width: int) -> dict[str, Tensor]:
    """The weights of a task with more base channels and the same output.

    The new channels compute something, of weights as at the start of a training: a runtime
    might be faster with zeros.
    """
    torch.manual_seed(0)
    wide = SegmentationTask(**{**narrow.architecture, "base_channels": width}).state_dict()
    for name, value in narrow.weights.items():
        target = wide[name]
        if value.ndim < 4:  # biases and batch normalisation, a number for each channel
            target[tuple(map(slice, value.shape))] = value
            continue
        if ".up." in name:  # transposed convolutions have their inputs first
            target, value = target.transpose(0, 1), value.transpose(0, 1)
        outputs, inputs = value.shape[:2]
        target[:outputs] = 0
        if ".expanding." in name and name.endswith(".0.weight"):
            # Its inputs are the skipped maps and, behind all of them, those from below.
            half, new_half = inputs // 2, target.shape[1] // 2
            target[:outputs, :half] = value[:, :half]
            target[:outputs, new_half : new_half + half] = value[:, half:]
        else:
            target[:outputs, :inputs] = value
    return wide


def write_images(folder: Path, sizes: Mapping[int, int], masks: bool = False) -> list[Path]:
    """Generated images as PNG in `images/`, sorted by size.

    Args:
        folder: Where to; what an earlier run has left there is deleted.
        sizes: Number of images of each side in px.
        masks: Write their labels into `masks/` beside them.
    """
    paths = []
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("images", "masks") if masks else ("images",):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for size, count in sizes.items():
        for number in range(count):
            image, labels = generate(number, size=size)
            paths.append(folder / "images" / f"{size:04d}-{number:03d}.png")
            Image.fromarray(image).save(paths[-1])
            if masks:
                Image.fromarray(labels).save(folder / "masks" / paths[-1].name)
    return paths


def tensor(number: int, size: int) -> Tensor:
    """A generated image as the network takes it, (1, 3, size, size)."""
    return to_input(generate(number, size=size)[0], (1.0, 99.8))[None]


def side_of_split(root: Path, side: str) -> list[CachedImage]:
    """The Data Science Bowl's images on one side of the project's split."""
    tree = open_tree(root)
    samples = [s for s in find_samples(tree)[0] if dsb2018()[s.id]["split"] == side]
    return prepare(tree, samples, default_cache_dir())
