"""What other libraries raise, made into the errors that are for people."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jsonargparse
import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from cellseg.errors import InputError, OutputError

# What a system says of a disk that is full or must not be written to, and of nothing else.
NOT_WRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}

# The packages that make a trainer of flags, and check them.
PARSERS = [Path(str(package.__file__)).parent for package in (jsonargparse, lightning)]
OPTIMIZERS = Path(torch.optim.__file__).parent


@contextmanager
def explained() -> Iterator[None]:
    """Explain what people can do something about, and leave all else as it is."""
    try:
        yield
    except (InputError, OutputError):
        raise
    except Exception as error:
        # Wherever the process is it learns of it; where it was logging, Lightning wraps that.
        if any(_is_of_a_loader(each) for each in (error, error.__cause__) if each is not None):
            raise OutputError(
                "a process that reads images was killed, perhaps for want of memory, or of shared "
                "memory (/dev/shm; --shm-size of a container); fewer of them (--data.num_workers "
                "0) or smaller batches need less; predict goes on where it stopped"
            ) from error
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{str(error.filename)[:80]}…: {error.strerror}") from error
        if isinstance(error, MisconfigurationException):  # by flags that do not go together
            raise InputError(str(error)) from error
        if str(error).startswith("loaded state dict ") or _is_of_an_optimizer(error):
            raise InputError(
                "the training to go on with had another optimiser; the script that it was started "
                "with goes on, and --model.weights FILE starts anew from its weights"
            ) from error
        if isinstance(error, ValueError | TypeError | ModuleNotFoundError) and _is_of_a_flag(error):
            raise InputError(f"--trainer: {error}") from error
        raise


def _is_of_a_flag(error: Exception) -> bool:
    """Whether Lightning refuses a setting: no code of the user's own is on the way to it."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    ours = Path(__file__).parent
    return _is_in(files[-1], *PARSERS) and all(_is_in(file, ours, *PARSERS) for file in files)


def _is_of_an_optimizer(error: Exception) -> bool:
    """Whether one of torch's, or a schedule, lacks what another one's state does not have."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, KeyError) and _is_in(Path(frames[-1].filename), OPTIMIZERS)


def _is_in(file: Path, *packages: Path) -> bool:
    return any(package in file.parents for package in packages)


def _is_of_a_loader(error: BaseException) -> bool:
    """Whether a loader process has died: torch sees it, or finds nobody to fetch an image from."""
    frames = traceback.extract_tb(error.__traceback__)
    raised_in = Path(frames[-1].filename).parent.name if frames else ""
    fetching = raised_in == "multiprocessing" and isinstance(error, OSError | EOFError)
    shared = re.search(r"/torch_\d+_", str(error))  # the name of a file in shared memory
    return fetching or str(error).startswith("DataLoader worker") or shared is not None


@contextmanager
def written_below(root: Path) -> Iterator[None]:
    """Explain where a run cannot write below its root, which others do in many places."""
    try:
        yield
    except OSError as error:
        place = Path(str(error.filename)).absolute() if error.filename else None
        below = place is not None and root in (place, *place.parents)
        if isinstance(error, OutputError) or not (below or error.errno in NOT_WRITTEN):
            raise
        raise OutputError(
            f"{place or root}: cannot be written: {error.strerror}; "
            "--trainer.default_root_dir names another place"
        ) from error
