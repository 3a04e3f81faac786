"""What `--data.diameter auto` is worth: images enlarged and shrunk, predicted in three ways.

    python benchmarks/diameter.py stage1_train.zip OUT [val|test]

`none` takes them as they are, `auto` estimates the diameter of the nuclei, and `true` is given the
factor by which they were rescaled. Scores are AP at IoU 0.5, means over images.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from cellseg.adapt import DIAMETER, to_grid
from cellseg.cli import main
from speed.subjects import side_of_split

FACTORS = (1 / 3, 1 / 2, 1, 2, 3)
LARGEST = 400  # px of an image's side, before it is rescaled
FEWEST = 12  # nuclei


def run(root: Path, out: Path, side: str) -> None:
    """Write the rescaled images, predict and score them, and print the table."""
    annotated = side_of_split(root, side)
    table = ["| scale | images | none | auto | true | rescaled by auto |", "|" + "--:|" * 6]
    seconds = {}
    for factor in FACTORS:
        folder = out / f"x{factor:g}"
        for name in ("images", "masks"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for sample in annotated:
            labels = np.asarray(sample.labels())
            if max(labels.shape) > LARGEST or labels.max() < FEWEST:
                continue
            height, width = (round(factor * size) for size in labels.shape)
            # Pillow averages where it shrinks, as a lens of lower magnification does.
            Image.fromarray(np.array(sample.image())).resize(
                (width, height), Image.Resampling.BICUBIC
            ).save(folder / "images" / f"{sample.id}.png")
            mask = to_grid(labels, (height, width)).astype(np.uint16)
            Image.fromarray(mask).save(folder / "masks" / f"{sample.id}.png")
        scores = []
        # A little more than it is, since twice as large still counts as known.
        true = f"{1.01 * DIAMETER * factor:.2f}"
        for way, diameter in (("none", "none"), ("auto", "auto"), ("true", true)):
            results, report = folder / way, folder / f"{way}_report"
            where = ["--data.predict_dir", str(folder / "images"), "--output.dir", str(results)]
            main(["predict", *where, "--data.diameter", diameter, "--output.formats", "labels"])
            where = ["--data.preds_dir", str(results), "--data.test_dir", str(folder)]
            main(["test", *where, "--trainer.default_root_dir", str(report)])
            scores.append(json.loads((report / "metrics.json").read_text())["test/ap50"])
            seconds[factor, way] = json.loads((results / "run.json").read_text())["seconds"]
        with (folder / "auto" / "summary.csv").open() as lines:
            rows = list(csv.DictReader(lines))
        rescaled = sum(row["scale"] != "1" for row in rows)
        values = " | ".join(f"{score:.3f}" for score in scores)
        table.append(f"| {factor:g} | {len(rows)} | {values} | {rescaled} |")
    print("\n".join(table))
    print(f"Time of auto over none, native images: {seconds[1, 'auto'] / seconds[1, 'none']:.2f}")


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if sys.argv[3:] else "test")
