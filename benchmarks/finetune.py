"""What fine-tuning on five images is worth: brightfield, for a model that has never seen any.

    python benchmarks/finetune.py stage1_train.zip OUT

A control is trained without the brightfield images. For each of three seeds, five brightfield
images of the train side (four, and one for validation) are what a user would have annotated: the
control is fine-tuned on them with `finetune.yaml`, and a network without weights is trained on
them by the same steps. All are scored on the eleven brightfield images of the other fields, of
all sides.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np

from cellseg.cli import main
from cellseg.data.groups import dsb2018

BRIGHTFIELD = "brightfield_black_on_white"
SEEDS = (0, 1, 2)
SHORT = ("--data.crops_per_epoch", "1000", "--trainer.max_epochs", "6")
FINETUNE = ("fit", "--config", "finetune.yaml")
SCRATCH = (*FINETUNE, "--model.weights", "null", "--model.base_channels", "16")
SCORES = ("test/map", "test/ap50", "test/dice")


def run(root: Path, out: Path) -> None:
    """Train and score, and print the table."""
    out.mkdir(parents=True, exist_ok=True)
    rows = dsb2018()
    bright = [name for name, row in rows.items() if row["modality"] == BRIGHTFIELD]
    sides = {name: row["split"] for name, row in rows.items() if row["split"] != "test"}
    split = write_split(out / "control.csv", {k: v for k, v in sides.items() if k not in bright})
    control = fit(out / "control", root, split, "fit", "--config", "nuclei.yaml", *SHORT)
    print("| seed | trained on | mean AP | AP 0.5 | Dice |\n|--:|---|--:|--:|--:|")
    for seed in SEEDS:
        train = [name for name in bright if sides.get(name) == "train"]
        five = np.random.default_rng(seed).permutation(train)[:5].tolist()
        here = dict.fromkeys(bright, "test") | dict.fromkeys(five, "train") | {five[0]: "val"}
        split, more = write_split(out / f"{seed}.csv", here), ("--data.seed", str(seed))
        seeded = ("--seed_everything", str(seed), *more)
        weights = ("--model.weights", str(control))
        models = {
            "no brightfield image": control,
            "the same, then five": fit(
                out / f"{seed}/finetuned", root, split, *FINETUNE, *weights, *seeded
            ),
            "five alone": fit(out / f"{seed}/scratch", root, split, *SCRATCH, *seeded),
        }
        for name, checkpoint in models.items():
            print(f"| {seed} | {name} | {score(checkpoint, root, split)} |", flush=True)


def write_split(path: Path, sides: dict[str, str]) -> Path:
    """A CSV for `--data.split`."""
    with path.open("w", newline="") as lines:
        csv.writer(lines).writerows([("image_id", "split"), *sides.items()])
    return path


def fit(folder: Path, root: Path, split: Path, *args: str) -> Path:
    """The best checkpoint of a run, which is not done twice."""
    checkpoint = folder / "lightning_logs/version_0/checkpoints/best.ckpt"
    if not (folder / ".done").exists():
        where = ("--trainer.default_root_dir", str(folder), "--data.root", str(root))
        if main([*args, *where, "--data.split", str(split)]):
            sys.exit(f"{folder}: training failed")
        (folder / ".done").touch()
    return checkpoint


def score(checkpoint: Path, root: Path, split: Path) -> str:
    """The cells of the table."""
    report = checkpoint.parents[1] / split.stem
    where = ("--trainer.default_root_dir", str(report), "--data.root", str(root))
    which = ("--data.split", str(split), "--data.diameter", "none")
    main(["test", "--ckpt_path", str(checkpoint), *where, *which])
    found = json.loads((report / "metrics.json").read_text())
    return " | ".join(f"{found[name]:.3f}" for name in SCORES)


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))
