"""How the memory of tensors is freed and allocated again."""

from __future__ import annotations

import ctypes
import sys

# Numbers of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let a training step reuse the memory of the step before, where glibc is the C library.

    By itself glibc gives blocks above 32 MB, such as one activation of a batch, back to the
    system at once. Each step then has the system clear hundreds of thousands of pages again, a
    third of its time on a CPU. The memory is the process's until it ends: the peak of a step.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)
