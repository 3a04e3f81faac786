"""A bare loop of training: `python fit_bare.py WIDTH STEPS KEEP` prints the seconds of a step.

What a script would do on a batch that is in memory: forward, the same loss, backward, AdamW in its
fused form, nothing else. With KEEP, 1 or 0, freed memory is kept as `cellseg fit` keeps it.
"""

from __future__ import annotations

import sys
from time import perf_counter

import torch

from cellseg.task import SegmentationTask
from cellseg.training.allocator import keep_freed_memory

BATCH, CROP = 8, 256  # those of nuclei.yaml
BEFORE = 3  # steps in which memory and the processor's caches are taken


def loop(width: int, steps: int) -> float:
    """Seconds of a step."""
    torch.manual_seed(0)
    task = SegmentationTask(out_channels=2, base_channels=width).train()
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-4, fused=True)
    image = torch.rand(BATCH, 3, CROP, CROP).contiguous(memory_format=torch.channels_last)
    target = (torch.rand(BATCH, 2, CROP, CROP) < 0.2).float()
    weight = torch.ones_like(target)
    started = perf_counter()
    for step in range(BEFORE + steps):
        if step == BEFORE:
            started = perf_counter()
        optimizer.zero_grad()
        task.loss(task.net(image), target, weight).backward()
        optimizer.step()
    return (perf_counter() - started) / steps


if __name__ == "__main__":
    width, steps, keep = map(int, sys.argv[1:])
    if keep:
        keep_freed_memory()
    print(loop(width, steps))
