"""The signals that ask a run to stop: Ctrl-C, and what schedulers send."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.queues import Queue

# With the exit codes that shells have for them.
EXIT_CODES = {signal.SIGINT.name: 130, signal.SIGTERM.name: 143}


@contextmanager
def end_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process within the block without a word.

    While modules are imported it may surface as any error, and no work is lost yet.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(EXIT_CODES["SIGINT"]))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def workers_end() -> Iterator[None]:
    """End the processes that begin within the block and are left after it.

    Those that load images outlive SIGTERM, by which Python would end them when it exits: it would
    wait for ever.
    """
    before = {*multiprocessing.active_children()}
    try:
        yield
    finally:
        left = {*multiprocessing.active_children()} - before
        if left and threading.current_thread() is threading.main_thread():
            # Torch's handler would raise an error for each. Windows has no such signal.
            number = getattr(signal, "SIGCHLD", None)
            handler = number and signal.signal(number, signal.SIG_DFL)
            for worker in left:
                worker.kill()
                worker.join()
            if number:
                signal.signal(number, handler)


def outlive_signals() -> None:
    """Ignore in this process what all processes get; the main one still has to save its work."""
    for name in EXIT_CODES:
        signal.signal(signal.Signals[name], signal.SIG_IGN)


def begin_loading(worker: int) -> None:
    """Prepare a loader process, of this number."""
    outlive_signals()
    # What it cannot send, as where shared memory is full, would be waited for for ever.
    Queue._on_queue_feeder_error = staticmethod(lambda error, item: os._exit(1))  # type: ignore[attr-defined]
