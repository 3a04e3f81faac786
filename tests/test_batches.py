from __future__ import annotations

from threading import Event, Thread

import pytest
import torch
from torch import Tensor

from cellseg.predict import batches
from cellseg.predict.batches import Batches


class Compute:
    """Tells what came together; the first call waits until all others are there."""

    def __init__(self) -> None:
        self.go, self.entered = Event(), Event()
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.shapes.append(tuple(images.shape))
        if len(self.shapes) == 1:
            self.entered.set()
            assert self.go.wait(30)
        return images.sum(dim=1)


def image(number: int, side: int) -> Tensor:
    return torch.full((1, 3, side, side), float(number))


def bring(gather: Batches, images: list[Tensor]) -> list[Tensor]:
    """Each image by a thread of its own, the first one well before the others."""
    compute = gather.compute
    assert isinstance(compute, Compute)
    results: list[Tensor] = [torch.empty(0)] * len(images)

    def run(place: int) -> None:
        results[place] = gather(images[place])

    threads = [Thread(target=run, args=(place,)) for place in range(len(images))]
    threads[0].start()
    assert compute.entered.wait(30)
    for thread in threads[1:]:
        thread.start()
    while len(gather._waiting) < len(images) - 1:
        pass
    compute.go.set()
    for thread in threads:
        thread.join(30)
    return results


def test_images_of_one_shape_that_wait_are_computed_together_and_come_back_to_their_owners() -> (
    None
):
    gather = Batches(Compute(), most=4)
    images = [image(number, side) for number, side in enumerate([8, 8, 6, 8, 6, 8, 8])]
    for result, given in zip(bring(gather, images), images, strict=True):
        assert torch.equal(result, given.sum(dim=1))
    # The first one alone, then all of its shape, then the others; blanks fill each batch.
    assert gather.compute.shapes[0] == (4, 3, 8, 8)
    assert sorted(gather.compute.shapes[1:]) == [(4, 3, 6, 6), (4, 3, 8, 8)]


def test_a_batch_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "PIXELS", 2 * 64)
    gather = Batches(Compute(), most=4)
    images = [image(number, 8) for number in range(5)] + [image(5, 16)]
    for result, given in zip(bring(gather, images), images, strict=True):
        assert torch.equal(result, given.sum(dim=1))
    assert sorted(gather.compute.shapes) == [(1, 3, 16, 16)] + [(2, 3, 8, 8)] * 3


def test_what_goes_wrong_is_told_to_one_and_tried_again_by_the_others() -> None:
    calls: list[int] = []

    def compute(images: Tensor) -> Tensor:
        calls.append(len(images))
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return images.sum(dim=1)

    gather = Batches(compute, most=2)
    with pytest.raises(RuntimeError, match="out of memory"):
        gather(image(1, 8))
    assert torch.equal(gather(image(2, 8)), image(2, 8).sum(dim=1))
