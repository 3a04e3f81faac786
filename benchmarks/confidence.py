"""Whether `confidence` tells which nuclei are right.

    python benchmarks/confidence.py stage1_train.zip [MODEL]

predicts the validation images of the project's split and prints, by confidence, how many of the
nuclei match a true one at an IoU above 0.5, those too that `--decode.min_confidence` would drop;
and the lowest confidences of whole images, as they are in `summary.csv`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

import cellseg
from cellseg.data.dataset import to_input
from cellseg.instances import decode
from cellseg.reading.recording import Array
from cellseg.segmenter import Segmentation
from speed.subjects import side_of_split

EDGES = (0.0, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 1.0)


def run(root: Path, model: str) -> None:
    """Print both tables."""
    loaded = cellseg.load(model)
    task = loaded.task
    nuclei, images = [], []
    for sample in side_of_split(root, "val"):
        with torch.inference_mode():
            probs = task.probs(to_input(sample.image(), loaded.percentiles)[None])[0].numpy()
        labels = decode(probs, replace(task.decoding, min_confidence=0.0))
        nuclei += matches(labels, probs[0], sample.labels())
        found = Segmentation(decode(probs, task.decoding), probs[0])
        images.append((found.confidence, sample.id[:8]))
    confidence, right = np.array(nuclei).T
    print("| confidence | nuclei | right |\n|---|--:|--:|")
    for low, high in pairwise(EDGES):
        inside = (low <= confidence) & (confidence < high)
        if inside.any():
            print(f"| {low:g} to {high:g} | {inside.sum()} | {right[inside].mean():.0%} |")
    print("\nLowest of whole images:", sorted(images)[:5])


def matches(preds: Array, probs: Array, target: Array) -> list[tuple[float, bool]]:
    """Confidence of each predicted nucleus, and whether it matches a true one."""
    width = int(target.max()) + 1
    pairs, overlap = np.unique(preds.astype(np.int64) * width + target, return_counts=True)
    pred, true = np.divmod(pairs, width)
    union = np.bincount(preds.ravel())[pred] + np.bincount(target.ravel())[true] - overlap
    right = set(pred[(pred > 0) & (true > 0) & (2 * overlap > union)])
    sums = np.bincount(preds.ravel(), probs.ravel()) / np.bincount(preds.ravel())
    return [(float(sums[n]), n in right) for n in range(1, len(sums))]


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2] if sys.argv[2:] else "nuclei-1")
