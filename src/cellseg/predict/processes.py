"""The processes of one prediction: they agree on the files, stop together, and notice a death."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cellseg.errors import InputError, OutputError

T = TypeVar("T")

# One process may still be at a huge image when all others are done. A dead one is noticed by its
# closed connection, so nothing depends on a time limit.
FOREVER = timedelta(days=365)
STOP = "cellseg/stop"
DIED = "a process of this run has died; the same command again does the rest"


class Processes:
    """This process and its fellows; alone it is the first of one.

    Launchers end all processes when one ends with an error, so the first one alone reports, when
    the others are done.

    Attributes:
        first: Whether this process speaks for all.
    """

    def __init__(self) -> None:
        self.first = True
        self._reason = ""
        self._told = False
        self._store: Any = None
        self._group: Any = None
        self._others: Any = None

    def agree(self, make: Callable[[], T]) -> T:
        """What the first process makes, for all of them; where it fails, the others just end."""
        if not dist.is_initialized():
            return make()
        self.first = dist.get_rank() == 0
        # Gloo notices a closed connection at once, which NCCL does not.
        self._group = dist.new_group(backend="gloo", timeout=FOREVER)
        self._store = dist.distributed_c10d._get_default_store()
        result: list[Any] = [None, None]
        if self.first:
            try:
                result[0] = make()
            except (InputError, OutputError) as error:
                result[1] = error
        dist.broadcast_object_list(result, group=self._group)
        made, refusal = result
        if refusal:
            raise refusal if self.first else SystemExit(0)
        if self.first:
            # It waits from now on for the others to leave, and so notices when one of them dies.
            kept = [torch.zeros(1) for _ in range(dist.get_world_size())]
            self._others = dist.gather(kept[0], kept, group=self._group, async_op=True)
        return made  # type: ignore[no-any-return]

    def stop(self, reason: str) -> None:
        """Ask all to stop after the image at hand; may be called by a signal's handler."""
        self._reason = self._reason or reason

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop; may be read by a signal's handler."""
        return bool(self._reason)

    def stopped(self) -> str:
        """Why all are to stop; empty where they are not.

        Raises:
            OutputError: A process has died.
        """
        if self._store is None:
            return self._reason
        try:
            if self._others is not None and self._others.is_completed():
                self._others.wait()
            if self._reason and not self._told:
                self._store.compare_set(STOP, "", self._reason)
                self._told = True
            if self._store.check([STOP]):
                self._reason = self._store.get(STOP).decode()
        except RuntimeError as error:
            raise OutputError(DIED) from error
        return self._reason

    def leave(self) -> str:
        """Wait until all are done, if this is the first process; gives `stopped`.

        Raises:
            OutputError: A process has died.
        """
        reason = self.stopped()
        try:
            if self._group is not None and not self.first:
                dist.gather(torch.zeros(1), group=self._group)
            while self._others is not None and not self._others.is_completed():
                time.sleep(0.05)  # a signal is heard only between two lines of Python
                reason = self.stopped()
        except RuntimeError as error:
            raise OutputError(DIED) from error
        if self._others is not None:
            reason = self.stopped()
        return reason
