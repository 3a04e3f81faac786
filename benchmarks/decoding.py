"""What `min_confidence` is worth, and the decoding that suits a model best.

    python benchmarks/decoding.py stage1_train.zip [MODEL]

predicts the validation images of the project's split and 120 of the train side. Prints the decoding
that `tune` finds on validation and, with it, the scores of both sides by `min_confidence`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import cellseg
from cellseg.data.cache import default_cache_dir, prepare
from cellseg.data.dataset import to_input
from cellseg.data.folders import find_samples, open_tree
from cellseg.data.groups import dsb2018
from cellseg.data.recording import Array
from cellseg.instances import decode
from cellseg.metrics import Scores, compare
from cellseg.training.tuning import tune

LEVELS = (0.0, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85)
# Images of each side; those of train tell whether a gain is of validation alone.
IMAGES = {"val": 65, "train": 120}


def run(root: Path, model: str) -> None:
    """Print the decoding and the table."""
    tuned = cellseg.load(model).task.decoding
    sides = {side: predict(root, model, side) for side in IMAGES}
    tuned, score = tune(sides["val"], tuned)
    print(f"{tuned}: mean AP {score:.3f}\n")
    print("| side | level | mean AP | AP 0.5 | mean AP pooled | merged | split | missed | extra |")
    print("|---|" + "--:|" * 8)
    for side, predictions in sides.items():
        for level in LEVELS:
            metric = Scores()
            for probs, target in predictions:
                preds = decode(probs, replace(tuned, min_confidence=level))
                metric.update(compare(target, preds))
            scores = metric.compute()
            row = [f"{scores[name]:.3f}" for name in ("map", "ap50", "map_pooled")]
            row += [f"{scores[name]:.0f}" for name in ("merged", "split", "missed", "extra")]
            print(f"| {side} | {level:g} | {' | '.join(row)} |")


def predict(root: Path, model: str, side: str) -> list[tuple[Array, Array]]:
    """Probabilities (2, H, W) and labels (H, W) of images spread over one side."""
    one = cellseg.load(model)
    tree = open_tree(root)
    samples = [s for s in find_samples(tree)[0] if dsb2018()[s.id]["split"] == side]
    places = np.linspace(0, len(samples) - 1, min(IMAGES[side], len(samples))).astype(int)
    predictions = []
    for sample in prepare(tree, [samples[place] for place in places], default_cache_dir()):
        with torch.inference_mode():
            probs = one.task.probs(to_input(sample.image(), one.percentiles)[None])
        predictions.append((probs, np.array(sample.labels())))
    return predictions


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2] if sys.argv[2:] else "nuclei-1")
