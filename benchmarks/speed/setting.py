"""What all measurements share: where they work, on which machine, how often."""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cellseg.cores import cores

VERSIONS = ("cellseg", "torch", "openvino", "lightning", "numpy", "scikit-image")


@dataclass(frozen=True)
class Setting:
    """How to measure.

    Attributes:
        folder: For images, results and logs.
        peers: Where the environments of other programs are.
        data: The Data Science Bowl's images, if they are there.
        repeats: How often each figure is measured.
        quick: Whether to measure on less, to try the benchmark itself.
    """

    folder: Path
    peers: Path
    data: Path | None
    repeats: int = 5
    quick: bool = False


def describe_machine() -> dict[str, Any]:
    """The processor, the cores granted, the memory and the versions."""
    versions = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    return {
        "processor": _processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        # Above 1 something else was running, and the figures are not worth much.
        "load_before": round(os.getloadavg()[0], 2),
        "versions": versions,
    }


def _processor() -> str:
    """Its model, and the sets of vector instructions that matter here."""
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*:\s*(.+)", text)
    flags = re.search(r"flags\s*:\s*(.+)", text)
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    found = [name for name in known if flags and name in flags[1].split()]
    return f"{model[1] if model else platform.machine()} ({', '.join(found)})"


def command(*arguments: object) -> list[str]:
    """`cellseg`, as a process of its own."""
    return [sys.executable, "-m", "cellseg", *map(str, arguments)]
