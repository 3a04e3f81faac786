"""Images of equal shape computed together, which a GPU does as fast as one."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor

# What fits on a small GPU, over all images of a batch.
PIXELS = 2**22


class Batches:
    """Gathers the images that threads bring one at a time.

    The first thread to arrive runs the network. Threads that arrive meanwhile wait, and the next
    one takes all waiting images of its shape as one batch. None waits for a batch to fill.

    Args:
        compute: Gives (N, ...) of images (N, 3, H, W); each result depends on its image alone.
        most: Largest batch, where `PIXELS` allow it.
    """

    def __init__(self, compute: Callable[[Tensor], Tensor], most: int) -> None:
        self.compute = compute
        self.most = most
        self._waiting: list[_Request] = []
        self._waiting_lock = Lock()
        self._compute_lock = Lock()

    def __call__(self, image: Tensor) -> Tensor:
        """The result (1, ...) of an image (1, 3, H, W)."""
        mine = _Request(image)
        with self._waiting_lock:
            self._waiting.append(mine)
        with self._compute_lock:
            if mine.result is None:
                self._compute(mine)
        assert mine.result is not None
        return mine.result

    def _compute(self, first: _Request) -> None:
        shape = first.image.shape
        most = max(1, min(self.most, PIXELS // (shape[-2] * shape[-1])))
        with self._waiting_lock:
            others = [r for r in self._waiting if r is not first and r.image.shape == shape]
            batch = [first, *others[: most - 1]]
            self._waiting = [r for r in self._waiting if r not in batch]
        # Always as many, since the rounding of a GPU depends on their number.
        blank = [torch.zeros_like(first.image)] * (most - len(batch))
        results = self.compute(torch.cat([*(request.image for request in batch), *blank]))
        for place, request in enumerate(batch):
            request.result = results[place : place + 1]


class _Request:
    """An image, and its result once there is one."""

    def __init__(self, image: Tensor) -> None:
        self.image = image
        self.result: Tensor | None = None
