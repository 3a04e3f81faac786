"""Makes a released model of a checkpoint.

python -m cellseg.weights CKPT FILE.safetensors [KEY=VALUE ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from cellseg.checkpoint import release

if __name__ == "__main__":
    ckpt, target, *facts = sys.argv[1:]
    about = {"name": Path(target).stem, **dict(fact.split("=", 1) for fact in facts)}
    release(Path(ckpt), Path(target), about)
