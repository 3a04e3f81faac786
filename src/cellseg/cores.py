"""The cores that this process may use; on a cluster they are fewer than the machine has."""

from __future__ import annotations

import os

import torch


def cores() -> int:
    """How many were granted: by SLURM to each task, by the affinity mask, or all there are."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have none
        allowed = os.cpu_count() or 1
    granted = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(int(granted), allowed) if granted.isdecimal() and int(granted) else allowed


def use_granted_cores() -> None:
    """Let torch use as many threads as SLURM has granted cores.

    By itself it keeps to the affinity mask, but not every SLURM sets one; and where it does,
    Lightning would divide the cores of one task once more by the number of tasks.
    """
    if "SLURM_CPUS_PER_TASK" in os.environ and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores())
        os.environ["OMP_NUM_THREADS"] = str(cores())  # Lightning and loader processes heed it
