"""The door: `main` answers at once, hands over to `application`, and turns errors into lines."""

from __future__ import annotations

import logging
import os
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from io import TextIOWrapper
from typing import TYPE_CHECKING, TextIO

from cellseg import __version__
from cellseg.errors import InputError, OutputError
from cellseg.signals import end_at_once, workers_end

if TYPE_CHECKING:
    from cellseg.task import SegmentationTask

log = logging.getLogger("cellseg")


def main(
    args: Sequence[str] | None = None,
    model_class: type[SegmentationTask] | None = None,
    allow: Iterable[str] = (),
) -> int:
    """Run the command.

    Args:
        args: As on the command line; by default what the process was started with.
        model_class: A subclass of `SegmentationTask` to use in its place.
        allow: Further modules whose classes a config may name, such as `__main__`.

    Returns:
        The exit code: 0 all done; 1 a file failed, or results could not be written; 2 nothing
        was tried; 130 stopped by Ctrl-C, 143 by SIGTERM.
    """
    args = list(sys.argv[1:] if args is None else args)
    if args == ["--version"]:
        print(__version__)
        return 0
    set_up_logging()
    if isinstance(sys.stdout, TextIOWrapper):  # a pipe on Windows knows few letters
        sys.stdout.reconfigure(errors="backslashreplace")
    # At once: the imports that follow take seconds.
    log.info("cellseg %s: %s …", __version__, args[0] if args else "help")

    with end_at_once():
        from cellseg.application import run
    return carry_out(lambda: run(args or ["--help"], model_class, allow))


def carry_out(work: Callable[[], int]) -> int:
    """Do the work of a command, whose errors for people become a line each.

    Args:
        work: Gives the exit code.

    Returns:
        The exit code, see `main`.
    """
    try:
        from cellseg.failures import explained  # here, since Lightning takes seconds to load

        with explained(), workers_end():
            return work()
    except (InputError, ArgumentError) as error:
        return _say(error, 2)
    except OutputError as error:
        return _say(error, 1)
    except KeyboardInterrupt:
        return 130


def _say(error: Exception, code: int) -> int:
    """Print an error as one line; gives the exit code back."""
    print(f"cellseg: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


class _BesideProgress(logging.StreamHandler[TextIO]):
    """Gives each message lines of its own, above the bars of what is under way."""

    def handle(self, record: logging.LogRecord) -> bool:
        # Bars are held up first, as Ctrl-C logs amid one of them: so two threads cannot both wait.
        progress = sys.modules.get("tqdm")  # where it was not loaded, there is no bar
        aside = progress.tqdm.external_write_mode(self.stream) if progress else nullcontext()
        with aside:
            return super().handle(record)


def set_up_logging() -> None:
    """Messages go to the error stream, from the first of several processes only."""
    handler = _BesideProgress()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    ranks = {os.environ.get(key, "0") for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID")}
    log.setLevel(logging.INFO if ranks == {"0"} else logging.ERROR)
