"""Measures what `--predict.runtime int8` needs of a model, and stores it with the model.

python -m cellseg.quantise MODEL --data.root DIR

MODEL is a checkpoint or the name of a model that comes with the package. The flags of `--data` are
those of `fit`. Of the images, those are measured that the model was trained on; where it knows
none of them, those that it would be trained on. The ranges go into the checkpoint, or into the
JSON beside a released model; the weights stay as they are.
"""

from __future__ import annotations

import json
import logging
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from tqdm import tqdm

from cellseg.arguments import bracket_lists, refuse_empty
from cellseg.atomic import write_json
from cellseg.checkpoint import Stored, read, resolve, write
from cellseg.cli import carry_out, set_up_logging
from cellseg.cores import use_granted_cores
from cellseg.data.datamodule import NucleiDataModule
from cellseg.nn.int8 import measure
from cellseg.task import SegmentationTask

log = logging.getLogger("cellseg.quantise")  # run as a module, its name is __main__

# Of nuclei-1, another draw of as many crops moves a range by 2 % on average and 6 % at most.
CROPS = 256
# Flags of other commands, and those that the model or this module sets.
NO_FLAGS = {
    *("test_dir", "preds_dir", "predict_dir", "plane", "invert", "diameter", "pixel_size"),
    *("include", "exclude", "shard", "percentiles", "augment", "crops_per_epoch", "batch_size"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; see the module.

    Args:
        args: As on the command line; by default what the process was started with.

    Returns:
        The exit code, see `cli.main`.
    """
    set_up_logging()
    use_granted_cores()
    parser = ArgumentParser(
        prog="python -m cellseg.quantise",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    parser.add_argument("model", metavar="MODEL", help="A checkpoint, or a model's name.")
    parser.add_class_arguments(NucleiDataModule, "data", skip=NO_FLAGS)

    def work() -> int:
        given = sys.argv[1:] if args is None else args
        refuse_empty(given)
        config = parser.parse_args(bracket_lists(given, {"data": NucleiDataModule}))
        path = resolve(config.model)
        stored = read(path)
        low, high = stored.settings["data.percentiles"]
        flags = config.data.as_dict()
        datamodule = NucleiDataModule(
            **flags, percentiles=(low, high), augment=0.0, crops_per_epoch=CROPS
        )
        quantise(path, stored, datamodule)
        return 0

    return carry_out(work)


def quantise(path: Path, stored: Stored, datamodule: NucleiDataModule) -> None:
    """Store with a model the ranges of its activations on crops of its training images.

    Args:
        path: A checkpoint, or the `.safetensors` of a released model.
        stored: What it says.
        datamodule: An epoch of its training crops is measured.

    Raises:
        InputError: The images cannot be read.
        OutputError: The model's folder cannot be written.
    """
    task = SegmentationTask(**stored.architecture).eval()
    task.adopt(stored, str(path))
    datamodule.trained_split = stored.split
    datamodule.setup("fit")
    trained = (stored.split or {}).get("train", {})
    if known := [sample for sample in datamodule.sides["train"] if sample.digest() in trained]:
        datamodule.sides["train"] = known
    crops = tqdm(datamodule.train_dataloader(), "Measuring", leave=False, disable=None)
    fast = torch.channels_last
    ranges = measure(task.net, (batch["image"].contiguous(memory_format=fast) for batch in crops))
    if path.suffix == ".safetensors":
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        stored_in = path.with_suffix(".json")
        write_json(stored_in, {**facts, "ranges": ranges})
    else:
        content = torch.load(path, map_location="cpu", weights_only=True)
        stored_in = path
        write(path, {**content, "ranges": ranges})
    log.info("Measured on %d crops and stored in %s", datamodule.crops_per_epoch, stored_in)


if __name__ == "__main__":
    sys.exit(main())
