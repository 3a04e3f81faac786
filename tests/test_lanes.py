from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from threading import Barrier, Event, Semaphore, Thread, Timer

import pytest
import torch

from cellseg.errors import OutputError
from cellseg.predict.lanes import Lanes


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_two_images_are_worked_on_side_by_side_and_share_the_threads() -> None:
    lanes, both, threads = Lanes(10), Barrier(2, timeout=30), []

    def work() -> None:
        both.wait()  # which fails if the other one does not run
        threads.append(torch.get_num_threads())

    for _ in range(10):
        lanes.add(work)
    lanes.wait()
    assert threads == [2] * 10
    assert torch.get_num_threads() == 4


def test_a_single_image_has_all_threads() -> None:
    lanes, threads = Lanes(1), list[int]()
    lanes.add(lambda: threads.append(torch.get_num_threads()))
    lanes.wait()
    assert (lanes.count, threads) == (1, [4])


def test_a_single_thread_is_not_divided() -> None:
    torch.set_num_threads(1)
    assert Lanes(10).count == 1


def test_only_one_image_waits_for_a_lane() -> None:
    lanes, go, taken = Lanes(10), Event(), Semaphore(0)

    def add_all() -> None:
        for _ in range(6):
            lanes.add(lambda: go.wait(30) and None)
            taken.release()

    def count() -> int:
        number = 0
        while taken.acquire(timeout=0.5):
            number += 1
        return number

    adding = Thread(target=add_all)
    adding.start()
    assert count() == 3
    go.set()
    adding.join(30)
    assert count() == 3
    lanes.wait()


@pytest.mark.parametrize("end", [lambda lanes: lanes.wait(), lambda lanes: lanes.add(print)])
def test_what_goes_wrong_in_a_lane_is_heard(end: Callable[[Lanes], None]) -> None:
    lanes = Lanes(10)

    def fail() -> None:
        raise RuntimeError("out of memory")

    for _ in range(3):
        lanes.add(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        end(lanes)


def test_what_has_not_begun_is_given_up() -> None:
    lanes, go, begun = Lanes(10), Event(), list[int]()
    for number in range(3):
        lanes.add(lambda number=number: begun.append(number) or (go.wait(30) and None))
    while len(begun) < 2:
        pass
    Timer(0.5, go.set).start()
    lanes.close()
    assert begun == [0, 1]


def test_beside_a_gpu_a_lane_has_work_done_by_another_process() -> None:
    lanes, found = Lanes(10, torch.device("cuda")), list[int]()
    for _ in range(4):
        lanes.add(lambda: found.append(lanes.aside(os.getpid)))
    lanes.wait()
    lanes.close()
    assert len(found) == 4
    assert os.getpid() not in found
    assert Lanes(10).aside(os.getpid) == os.getpid()


def test_a_killed_process_is_told_of() -> None:
    lanes = Lanes(10, torch.device("cuda"))
    with pytest.raises(OutputError, match="killed"):
        lanes.aside(os._exit, 9)
    lanes.close()
