"""Makes a released model of a checkpoint: `python -m cellseg.weights CKPT FILE.safetensors`."""

from __future__ import annotations

import sys
from pathlib import Path

from cellseg.checkpoint import release

if __name__ == "__main__":
    release(Path(sys.argv[1]), Path(sys.argv[2]), {"name": Path(sys.argv[2]).stem})
