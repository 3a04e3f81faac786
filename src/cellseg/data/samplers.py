"""Which items a process takes, in which order, and from where it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Sampler


class EndlessSampler(Sampler[int]):
    """The crop numbers of one epoch, going on where training stands.

    The position is a function of the steps taken, not a state of its own: a run resumed in
    mid-epoch sees the crops it would have seen.

    Args:
        crops: Crops of an epoch, over all processes.
        position: Crops taken so far, over all processes.
        rank: Of this process.
        world_size: Number of processes.
    """

    def __init__(
        self, crops: int, position: Callable[[], int], rank: int = 0, world_size: int = 1
    ) -> None:
        self.crops = crops
        self.position = position
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.crops // self.world_size

    def __iter__(self) -> Iterator[int]:
        start = self.position() + self.rank
        return iter(range(start, start + self.crops, self.world_size)[: len(self)])


class Share(Sampler[tuple[int, bool]]):
    """One process's share of a set of images, in order.

    Every process gets equally many items, as its collective calls demand; what fills up the
    last round is marked as a repeat, which is computed but neither counted nor written.
    Lightning's own sampler pads without a mark (biased scores) or not at all (a process
    without an image fails).
    """

    def __init__(self, size: int, rank: int = 0, world_size: int = 1) -> None:
        self.size = size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return -(-self.size // self.world_size)

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        for index in range(self.rank, len(self) * self.world_size, self.world_size):
            yield (index, False) if index < self.size else (0, True)


class ResumableLoader(DataLoader[dict[str, Any]]):
    """A loader that Lightning may resume in mid-epoch.

    Its place is the trainer's step count, see `EndlessSampler`, so its own state is empty.
    """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
