"""Many small files: the speed of `predict`, ten kills, and what finding nothing to do costs.

    python benchmarks/many.py OUT [FILES]

Generated images of 256 px are predicted with the default formats by a clean run; again by a run
that is killed (SIGKILL) ten times at random moments and started again; and once more when all is
done. Labels, overlays and objects.csv must be equal byte for byte. Beside the first run stands the
network alone, on the same pixels in memory, with the same runtime. Linux only.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import cellseg
from cellseg.data.dataset import to_input
from cellseg.data.synthetic import generate

FILES, SIZE, KILLS = 5000, 256, 10
# Of the pictures, which take longer to draw than to predict; every file is another crop of one.
DRAWN, MARGIN = 40, 32


def write(folder: Path, count: int) -> None:
    """`count` images, no two alike."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [generate(number, size=SIZE + MARGIN)[0] for number in range(DRAWN)]
    for number in range(count):
        rng = np.random.default_rng(number)
        top, left = rng.integers(MARGIN, size=2)
        crop = pictures[number % DRAWN][top : top + SIZE, left : left + SIZE]
        noisy = np.clip(crop + rng.normal(0, 2, crop.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:05d}.png", compress_level=1)


def start(images: Path, out: Path) -> subprocess.Popen[bytes]:
    """`cellseg predict`."""
    command = [sys.executable, "-m", "cellseg", "predict", "--data.predict_dir", str(images)]
    command += ["--output.dir", str(out), "--trainer.enable_progress_bar", "false"]
    return subprocess.Popen(command)


def finish(images: Path, out: Path) -> float:
    """Seconds of a run from its start to its end."""
    began = time.monotonic()
    if start(images, out).wait():
        sys.exit("predict failed")
    return time.monotonic() - began


def network_alone(images: Path) -> float:
    """Seconds for all images, from every tenth of them."""
    task = cellseg.load("nuclei-1").task
    paths = sorted(images.iterdir())
    tensors = [to_input(np.asarray(Image.open(path)), (1.0, 99.8))[None] for path in paths[::10]]
    with torch.inference_mode():
        task(tensors[0])
        began = time.monotonic()
        for tensor in tensors:
            task(tensor)
    return (time.monotonic() - began) * len(paths) / len(tensors)


def kill_and_finish(images: Path, out: Path, seconds: float) -> list[int]:
    """Kill ten runs, each within a tenth of the time of a whole one; gives how far each came."""
    rng = np.random.default_rng(0)
    reached = []
    for _ in range(KILLS):
        process = start(images, out)
        time.sleep(rng.uniform(5, 5 + seconds / KILLS))
        process.kill()
        process.wait()
        reached.append(sum(1 for _ in out.glob("*_labels.tif")))
    finish(images, out)
    return reached


def results(out: Path) -> dict[str, bytes]:
    """All that does not tell of time or of the folder."""
    timed = {"summary.csv", "run.json", "report.html"}
    files = (path for path in out.iterdir() if path.is_file() and path.name not in timed)
    return {path.name: path.read_bytes() for path in files}


def run(out: Path, count: int) -> None:
    """Measure and print."""
    shutil.rmtree(out, ignore_errors=True)
    images, clean, killed = out / "images", out / "clean", out / "killed"
    write(images, count)
    whole = finish(images, clean)
    inside = json.loads((clean / "run.json").read_text())["seconds"]
    print(f"{count:,} files: {whole:.0f} s, {count / inside:.1f} a second after the start")
    alone = network_alone(images)
    print(f"network alone: {alone:.0f} s, {alone / inside:.2f} of the run")
    print(f"nothing to do: {finish(images, clean):.1f} s")
    reached = kill_and_finish(images, killed, whole)
    one, other = results(clean), results(killed)
    differ = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    print(f"killed with {', '.join(map(str, reached))} files done; {len(differ)} results differ")


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else FILES)
