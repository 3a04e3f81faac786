from __future__ import annotations

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource
import torch
from cellseg.training.allocator import keep_freed_memory

if {cured}:
    keep_freed_memory()
weight = torch.ones(1, requires_grad=True)
pages = []
for step in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activation = torch.zeros(12 << 20) * weight  # 48 MB; the gradient is made by another thread
    activation.square().sum().backward()
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    del activation
print(min(pages[4:]))  # two threads allocate, and take a few steps to find their places
"""


def pages_cleared(cured: bool) -> int:
    command = [sys.executable, "-c", STEPS.format(cured=cured)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library is not glibc")
@pytest.mark.slow
def test_a_step_of_training_uses_the_memory_of_the_step_before() -> None:
    assert pages_cleared(cured=True) < pages_cleared(cured=False) / 4
