"""Times a network whenever it is asked to; runs in the environment of another program."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from time import perf_counter


def serve(about: str, forward: Callable[[], object]) -> None:
    """Say what is there, then answer each line with the seconds of one call.

    Args:
        about: For the table.
        forward: Computes the network once.
    """
    _say(about)
    for _ in sys.stdin:
        started = perf_counter()
        forward()
        _say(perf_counter() - started)


# What libraries print must not come between the answers.
_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def _say(what: object) -> None:
    print(json.dumps(what), file=_answers, flush=True)
