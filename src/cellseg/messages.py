"""Which messages of other libraries reach people."""

from __future__ import annotations

import logging
import warnings

# Warnings of Lightning that say nothing a user could act on.
QUIET = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # its own use of torch
    "Be aware that when using `ckpt_path`, callbacks",  # prediction needs no early stopping
    "The dirpath has changed",  # a run that starts from one elsewhere has a best of its own
    "Checkpoint directory .* exists and is not empty",  # that of the run that goes on
    "Total length of `DataLoader` across ranks is zero",  # all is done already
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    "Precision .* is not supported by the model summary",
    r"`ModelCheckpoint\(monitor=.*could not find the monitored key",  # `Tuning` says it
    r"It is recommended to use `self.log\(.*sync_dist=True",  # the metrics sum over processes
    "The ``compute`` method of metric .* was called before",  # a process without an image
    "The '.*_dataloader' does not have many workers",  # one leaves the other cores to torch
)
# Of others' messages, those that help. They are set on import, so this comes after it.
LOG_LEVELS = {
    "lightning.pytorch": logging.WARNING,  # devices that there are not, and tips
    "lightning.fabric": logging.WARNING,
    "lightning.pytorch.callbacks.early_stopping": logging.INFO,  # of one that is to be verbose
    "lightning.pytorch.callbacks.model_summary": logging.INFO,
    "lightning.pytorch.profilers": logging.INFO,
    "tifffile": logging.CRITICAL,  # what it finds in a damaged file is in that file's error row
}


def quieten() -> None:
    """Silence the messages in `QUIET`, and those below `LOG_LEVELS`."""
    for message in QUIET:
        warnings.filterwarnings("ignore", message)
    for name, level in LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
