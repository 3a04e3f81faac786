"""Runs a command and watches it and all processes that it starts. Linux only."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def watch(
    command: Sequence[str], log: Path, probe: Callable[[int], float], interval: float = 0.05
) -> list[tuple[float, float]]:
    """Run a command to its end.

    Args:
        command: What to run.
        log: Where its messages go.
        probe: What to look at, given the number of its process.
        interval: In seconds.

    Returns:
        The times, in seconds since 1970, and what was seen then.

    Raises:
        RuntimeError: The command failed.
    """
    readings = []
    with log.open("w") as messages:
        process = subprocess.Popen(command, stdout=messages, stderr=messages)
        try:
            while process.poll() is None:
                readings.append((time.time(), probe(process.pid)))
                time.sleep(interval)
        finally:
            process.kill()  # if the benchmark is stopped, so is what it runs
            process.wait()
    if code := process.returncode:
        raise RuntimeError(f"exit code {code}: {' '.join(log.read_text().split()[-40:])}")
    return readings


def cpu_seconds(root: int) -> float:
    """That a process and those below it have used, also those that have ended."""
    total = 0
    for pid in _tree(root):
        with suppress(OSError):  # it has just ended
            # After the name in brackets, which may hold spaces; see proc_pid_stat(5).
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15]))
    return total / TICKS


def memory(root: int) -> float:
    """In bytes, of a process and those below it; what several share counts once."""
    total = 0
    for pid in _tree(root):
        with suppress(OSError):
            found = re.search(r"Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text())
            total += 1024 * int(found[1]) if found else 0
    return float(total)


def _tree(pid: int) -> Iterator[int]:
    yield pid
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _tree(int(child))
