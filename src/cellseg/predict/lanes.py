"""Several images at a time: no core or GPU waits while nuclei are traced and files written."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from cellseg.cores import cores
from cellseg.errors import OutputError
from cellseg.signals import outlive_signals

T = TypeVar("T")

CPU = torch.device("cpu")
ON_CPU = 2
ON_GPU = 8


class Lanes:
    """Works on images in threads that share the threads of torch.

    On a CPU the network keeps every core busy, all else of an image one. Side by side two lanes
    fill each other's gaps; one for each core would need the memory of as many images. A GPU has
    its network done in no time, so there is a lane for each core, and what Python's lock would
    not let run side by side goes to a process of its own.

    Args:
        images: How many there are in all. The number of torch's threads for an image is fixed for
            the whole run, because floating-point rounding depends on it: a run that goes on finds
            what it would have found.
        device: What computes the network.

    Attributes:
        count: How many images are worked on at a time.
        on_gpu: Whether the network is computed on another device than the CPU.
    """

    def __init__(self, images: int, device: torch.device = CPU) -> None:
        threads = torch.get_num_threads()
        self.on_gpu = device.type != "cpu"
        most = min(ON_GPU, cores()) if self.on_gpu else min(ON_CPU, threads)
        self.count = max(1, min(most, images))
        share = threads if self.on_gpu else threads // self.count
        self._pool = ThreadPoolExecutor(self.count, "lane", torch.set_num_threads, (share,))
        self._running: set[Future[None]] = set()
        self._processes: ProcessPoolExecutor | None = None
        if self.on_gpu:
            # A fork would have the state of CUDA, and the locks of other threads.
            spawned = multiprocessing.get_context("spawn")
            self._processes = ProcessPoolExecutor(self.count, spawned, outlive_signals)

    def add(self, work: Callable[[], None]) -> None:
        """Have work done by the next free lane; blocks while one is waiting for a lane already.

        Raises:
            Exception: What earlier work raised.
        """
        while len(self._running) > self.count:
            self._collect()
        self._running.add(self._pool.submit(work))

    def aside(self, work: Callable[..., T], *args: Any) -> T:
        """Call a function of a module, for a lane: in a process of its own where there are any.

        Raises:
            OutputError: That process has been killed.
        """
        if self._processes is None:
            return work(*args)
        try:
            return self._processes.submit(work, *args).result()
        except BrokenProcessPool as error:
            raise OutputError(
                "a process that traces nuclei was killed, perhaps for want of memory; "
                "the same command again does the rest"
            ) from error

    def wait(self) -> None:
        """Until all work is done; raises as `add` does."""
        while self._running:
            self._collect()

    def close(self) -> None:
        """Give up what has not begun, and wait for the rest; errors are not heard."""
        self._pool.shutdown(cancel_futures=True)
        if self._processes is not None:
            self._processes.shutdown()

    def _collect(self) -> None:
        done, self._running = wait(self._running, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
