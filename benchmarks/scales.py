"""How the scores depend on the size of nuclei.

    python benchmarks/scales.py stage1_train.zip OUT [--ckpt_path CKPT ...]

rescales the test images of the project's split, with their labels, and scores each size with
`cellseg test`; further arguments are passed on. Images above 2,048 px are left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from cellseg.cli import main
from cellseg.data.cache import default_cache_dir, prepare
from cellseg.data.folders import find_samples, open_tree
from cellseg.data.splits import dsb2018

FACTORS = (1 / 3, 1 / 2, 1, 2, 3)
LARGEST = 2048


def run(root: Path, out: Path, args: list[str]) -> int:
    """Write the rescaled images below `out` and score each size; the worst exit code."""
    tree = open_tree(root)
    samples = [s for s in find_samples(tree)[0] if dsb2018()[s.id]["split"] == "test"]
    annotated = prepare(tree, samples, default_cache_dir())
    codes = []
    for factor in FACTORS:
        folder = out / f"x{factor:.2f}"
        for name in ("images", "masks"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for sample in annotated:
            labels = sample.labels()
            if max(FACTORS) * max(labels.shape) > LARGEST:
                continue
            size = (round(factor * labels.shape[1]), round(factor * labels.shape[0]))
            image = Image.fromarray(np.array(sample.image()))
            # Pillow averages where it shrinks, as a lens of lower magnification does.
            image.resize(size, Image.Resampling.BICUBIC).save(
                folder / "images" / f"{sample.id}.png"
            )
            mask = Image.fromarray(np.array(labels, np.int32), "I")
            small = np.asarray(mask.resize(size, Image.Resampling.NEAREST)).astype(np.uint16)
            Image.fromarray(small).save(folder / "masks" / f"{sample.id}.png")
        result = ["--trainer.default_root_dir", str(folder / "report")]
        codes.append(main(["test", "--data.test_dir", str(folder), *result, *args]))
    return max(codes)


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
