"""The signals that ask a run to stop: Ctrl-C, and what schedulers send."""

from __future__ import annotations

import signal

# With the exit codes that shells have for them.
EXIT_CODES = {signal.SIGINT.name: 130, signal.SIGTERM.name: 143}


def outlive_signals(worker: int = 0) -> None:
    """Leave them to the main process: all get them, and it still has to save its work.

    Args:
        worker: Number of this process, which loaders give.
    """
    for name in EXIT_CODES:
        signal.signal(signal.Signals[name], signal.SIG_IGN)
