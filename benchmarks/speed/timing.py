"""How things are timed: in turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TypeVar

T = TypeVar("T")


def in_turns(repeats: int, *actions: Callable[[], T], warm_up: bool = True) -> list[tuple[T, ...]]:
    """What each action gives, called in the order A B A B and so on.

    Args:
        repeats: How often each is done.
        actions: What is compared.
        warm_up: Do all of them once before, without counting it.

    Returns:
        The results of each action.
    """
    rounds = [tuple(action() for action in actions) for _ in range(repeats + warm_up)]
    return list(zip(*rounds[warm_up:], strict=True))


def seconds_of(action: Callable[[], object]) -> Callable[[], float]:
    """Gives the mean seconds of an action, which is done until 0.3 seconds are over.

    One call of some milliseconds would measure how fast sleeping threads wake up.
    """

    def timed() -> float:
        calls, elapsed, started = 0, 0.0, perf_counter()
        while elapsed < 0.3:
            action()
            calls += 1
            elapsed = perf_counter() - started
        return elapsed / calls

    return timed


def milliseconds(seconds: float) -> str:
    """For a note."""
    return f"{1000 * seconds:,.3g} ms" if seconds < 1 else f"{1000 * seconds:,.0f} ms"
