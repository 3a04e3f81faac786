"""Two images at a time, so that no core waits while nuclei are traced and files are written."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import torch

LANES = 2


class Lanes:
    """Works on images in threads that share the threads of torch.

    The network keeps every core busy, all else of an image one. Side by side they fill each
    other's gaps; a lane for each core would need the memory of as many images.

    Args:
        images: How many there are in all. The share of torch's threads that an image gets must
            not depend on how many of them are done already: its rounding does.

    Attributes:
        count: How many images are worked on at a time.
    """

    def __init__(self, images: int) -> None:
        threads = torch.get_num_threads()
        self.count = max(1, min(LANES, images, threads))
        share = threads // self.count
        self._pool = ThreadPoolExecutor(self.count, "lane", torch.set_num_threads, (share,))
        self._running: set[Future[None]] = set()

    def add(self, work: Callable[[], None]) -> None:
        """Have work done by the next free lane; one waits, so that no lane has to.

        Raises:
            Exception: What earlier work raised.
        """
        while len(self._running) > self.count:
            self._collect()
        self._running.add(self._pool.submit(work))

    def wait(self) -> None:
        """Until all work is done; raises as `add` does."""
        while self._running:
            self._collect()

    def close(self) -> None:
        """Give up what has not begun, and wait for the rest; errors are not heard."""
        self._pool.shutdown(cancel_futures=True)

    def _collect(self) -> None:
        done, self._running = wait(self._running, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
