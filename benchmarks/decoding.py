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
from cellseg.data.dataset import to_input
from cellseg.instances import decode
from cellseg.metrics import Scores, compare
from cellseg.model import Model
from cellseg.reading.recording import Array
from cellseg.training.tuning import tune
from speed.subjects import side_of_split

LEVELS = (0.0, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85)
# Images of each side; those of train tell whether a gain is of validation alone.
IMAGES = {"val": 65, "train": 120}


def run(root: Path, model: str) -> None:
    """Print the decoding and the table."""
    loaded = cellseg.load(model)
    sides = {side: predict(root, loaded, side) for side in IMAGES}
    tuned, score = tune(sides["val"], loaded.task.decoding)
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


def predict(root: Path, model: Model, side: str) -> list[tuple[Array, Array]]:
    """Probabilities (2, H, W) and labels (H, W) of images spread over one side."""
    samples = side_of_split(root, side)
    places = np.linspace(0, len(samples) - 1, min(IMAGES[side], len(samples))).astype(int)
    predictions = []
    for sample in (samples[place] for place in places):
        with torch.inference_mode():
            probs = model.task.probs(to_input(sample.image(), model.percentiles)[None])[0].numpy()
        predictions.append((probs, np.array(sample.labels())))
    return predictions


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2] if sys.argv[2:] else "nuclei-1")
