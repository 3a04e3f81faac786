"""What models find in images that are worse than those of the Data Science Bowl.

    python benchmarks/perturbed.py stage1_train.zip val|test MODEL [MODEL ...]

blurs, shrinks, compresses, ... the images of one side of the project's split, predicts them as
`cellseg.load` does by default, and prints a table a model: means over images. The changes of an
image are the same for each model.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

import cellseg
from cellseg.adapt import to_grid
from cellseg.metrics import compare, scores
from cellseg.reading.recording import Array
from speed.subjects import side_of_split

SCORES = ("dice", "iou", "map", "ap50")


def _blurred(image: Array, rng: np.random.Generator) -> Array:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), 1.5))


def _noisy(image: Array, rng: np.random.Generator) -> Array:
    noise = rng.normal(0, 0.08 * np.ptp(image.astype(int)), image.shape[:2])
    return _grey_levels(image + noise[..., None])


def _jpeg(image: Array, rng: np.random.Generator) -> Array:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=25)
    return np.asarray(Image.open(file))


def _unevenly_lit(image: Array, rng: np.random.Generator) -> Array:
    """Full light at one border, 0.4 of it at the other."""
    height, width = image.shape[:2]
    angle = rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[:height, :width]
    along = np.cos(angle) * columns / width + np.sin(angle) * rows / height
    share = (along - along.min()) / np.ptp(along)
    return _grey_levels(image * (0.4 + 0.6 * share)[..., None])


def _halved(image: Array, rng: np.random.Generator) -> Array:
    height, width = (round(side / 2) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _grey_levels(values: Array) -> Array:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


CHANGES: dict[str, Callable[[Array, np.random.Generator], Array]] = {
    "as they are": lambda image, rng: image,
    "blurred, sigma 1.5 px": _blurred,
    "noise of 8 % of the range": _noisy,
    "JPEG of quality 25": _jpeg,
    "uneven light": _unevenly_lit,
    "half the size": _halved,
}


def run(root: Path, side: str, models: list[str]) -> None:
    """Print the tables."""
    annotated = side_of_split(root, side)
    for name in models:
        model = cellseg.load(name)
        print(f"\n{name}, {len(annotated)} images of {side}\n")
        print(f"| images | {' | '.join(SCORES)} |", "|---|" + "--:|" * len(SCORES), sep="\n")
        means = []
        for change, apply in CHANGES.items():
            found = []
            for sample in tqdm(annotated, change, leave=False, disable=None):
                rng = np.random.default_rng(int(sample.digest(), 16))
                image = apply(np.array(sample.image()), rng)
                labels = to_grid(np.asarray(sample.labels()), image.shape[:2])
                found.append(scores(compare(labels, model.predict(image))))
            means.append([float(np.mean([one[score] for one in found])) for score in SCORES])
            print(f"| {change} | {' | '.join(f'{mean:.3f}' for mean in means[-1])} |", flush=True)
        print(f"| mean | {' | '.join(f'{mean:.3f}' for mean in np.mean(means, axis=0))} |")


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
