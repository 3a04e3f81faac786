"""What is chosen after training: how much of it counts, and how probabilities become nuclei."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from cellseg.checkpoint import write
from cellseg.data.datamodule import NucleiDataModule
from cellseg.errors import InputError, counted
from cellseg.instances import Decoding, decode
from cellseg.metrics import compare, scores
from cellseg.task import SegmentationTask
from cellseg.training.checkpoints import BestAndLast

log = logging.getLogger(__name__)

# In the order in which they matter.
CANDIDATES: dict[str, tuple[Any, ...]] = {
    "marker": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "threshold": (0.3, 0.4, 0.5, 0.6, 0.7),
    "min_area": (0, 5, 10, 15, 20, 30, 50, 80),
    # Higher levels still gain a little mean AP, but miss many more nuclei, see `docs/maps.md`.
    "min_confidence": (0.0, 0.6, 0.65, 0.7, 0.75),
}
ROUNDS = 2
# Shares of the learnt weights, besides 1, in mixtures with those that training started from.
SHARES = (0.75, 0.5, 0.25, 0.0)
# Name to tensor, of a whole task.
Weights = dict[str, Tensor]
# Probabilities (C, H, W) and true labels (H, W) of each image.
Predictions = Sequence[tuple[NDArray[Any], NDArray[Any]]]


class Tuning(pl.Callback):
    """Tunes the decoding on validation when training ends, and stores it in the checkpoints.

    The best checkpoint is read again for it, and stays in the model. Where training started from
    weights, those are mixed with what was learnt, as much as validation likes best.

    Args:
        images: Most validation images to use; 0 leaves the decoding as it is.
    """

    def __init__(self, images: int = 100) -> None:
        if images < 0:
            raise InputError(f"--tuning.images {images}: must not be negative")
        self.images = images
        self.trained = False  # in this run

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, SegmentationTask)
        self.trained = True
        before = {name: value.clone() for name, value in pl_module.state_dict().items()}
        try:
            with _ends_at_sigterm(trainer):
                self._tune(trainer, pl_module)
        except BaseException:  # these are the weights that the last checkpoint is to have
            pl_module.load_state_dict(before)
            raise

    def make_up(self, trainer: pl.Trainer, pl_module: SegmentationTask) -> None:
        """Tune what a run that was stopped after its last step could not."""
        best = _best_of(trainer)
        if best and "tuned" not in torch.load(best, "cpu", weights_only=True):
            self._tune(trainer, pl_module)

    def _tune(self, trainer: pl.Trainer, pl_module: SegmentationTask) -> None:
        best = _best_of(trainer)
        unwanted = not self.images or getattr(trainer, "fast_dev_run", False)
        if not trainer.is_global_zero or unwanted:
            return
        if best is None:
            log.warning(
                f"No {_checkpoint_of(trainer).monitor} was logged, so there is no best checkpoint, "
                f"and not tuned: {_flags(pl_module.decoding)}"
            )
            return
        content = torch.load(best, map_location="cpu", weights_only=True)
        content["state_dict"], predictions = self._mixed(trainer, pl_module, content["state_dict"])
        pl_module.load_state_dict(content["state_dict"])
        if not any(target.any() for _, target in predictions):
            log.warning(
                "No nuclei to validate on: decoding stays at %s", _flags(pl_module.decoding)
            )
            return
        pl_module.decoding, ap = tune(predictions, pl_module.decoding)
        tuned = {"decoding": asdict(pl_module.decoding), "tuned": True}
        last = best.with_name("last.ckpt")
        if last.is_file():
            write(last, torch.load(last, "cpu", weights_only=True) | tuned)
        write(best, content | tuned)
        log.info(
            "Tuned on %s: %s, mean AP %.3f",
            counted(len(predictions), "validation images"), _flags(pl_module.decoding), ap,
        )  # fmt: skip

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        assert isinstance(pl_module, SegmentationTask)
        if trainer.state.fn == "fit" and trainer.is_global_zero and trainer.global_step:
            mixed = "" if pl_module.initial_weights is None else ", nor mixed with its start"
            log.warning("Stopped, so not tuned%s: %s", mixed, _flags(pl_module.decoding))

    def _mixed(
        self, trainer: pl.Trainer, pl_module: SegmentationTask, learnt: Weights
    ) -> tuple[Weights, Predictions]:
        """The weights to keep and what they predict.

        Few images teach a trained model their own kind at the cost of what it knew. Between its
        old and its new weights is often one that is better than both: Wortsman et al. 2022
        (https://arxiv.org/abs/2109.01903).
        """
        pl_module.load_state_dict(learnt)
        chosen = learnt, self._predictions(trainer, pl_module)
        if pl_module.initial_weights is None:
            return chosen
        scored = {1.0: mean_ap(chosen[1], pl_module.decoding)}
        for share in SHARES:
            weights = mix(pl_module.initial_weights, learnt, share)
            pl_module.load_state_dict(weights)
            predictions = self._predictions(trainer, pl_module)
            score = mean_ap(predictions, pl_module.decoding)
            if score > max(scored.values()):
                chosen = weights, predictions
            scored[share] = score
        log.info(
            "Mean AP by the share of what was learnt, the rest being what it started from: %s; "
            "%.0f%% is kept",
            ", ".join(f"{share:.0%} {score:.3f}" for share, score in scored.items()),
            100 * max(scored, key=lambda share: scored[share]),
        )
        return chosen

    def _predictions(self, trainer: pl.Trainer, pl_module: SegmentationTask) -> Predictions:
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(datamodule, NucleiDataModule)
        dataset = datamodule.whole_images("val")
        # None are known where there was nothing left to train.
        limit = trainer.world_size * sum(trainer.num_val_batches) or len(dataset)
        count = int(min(self.images, limit, len(dataset)))
        # Spread over the images, which are sorted, so that all kinds are there.
        places = np.linspace(0, len(dataset) - 1, count).astype(int)
        predictions = []
        pl_module.eval()
        with torch.inference_mode(), trainer.precision_plugin.val_step_context():
            for place in tqdm(places.tolist(), "Predicting for tuning", leave=False, disable=None):
                item = dataset[(place, False)]
                probs = pl_module.probs(item["image"][None])[0].half().cpu().numpy()
                predictions.append((probs, item["labels"].numpy()))
        return predictions


@contextmanager
def _ends_at_sigterm(trainer: pl.Trainer) -> Iterator[None]:
    """Let SIGTERM end the block; Lightning would look for it before the next batch only."""

    def end(*_: object) -> None:
        raise SIGTERMException

    # The first of several processes would wait for the others to save with it.
    if trainer.world_size > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    if trainer.received_sigterm:
        end()
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _checkpoint_of(trainer: pl.Trainer) -> BestAndLast:
    """The callback that keeps the best; users may add others, which keep what they like."""
    return next(c for c in trainer.checkpoint_callbacks if isinstance(c, BestAndLast))


def _best_of(trainer: pl.Trainer) -> Path | None:
    best = Path(_checkpoint_of(trainer).best_model_path)
    return best if best.is_file() else None


def mix(start: Weights, learnt: Weights, share: float) -> Weights:
    """Weights between two, with so much of the second; whole numbers are those of the second."""
    return {
        name: start[name].to(value).lerp(value, share) if value.is_floating_point() else value
        for name, value in learnt.items()
    }


def mean_ap(predictions: Predictions, decoding: Decoding) -> float:
    """The mean AP of predictions, a mean over images; see `tune`."""
    each = [
        scores(compare(target, decode(probs.astype(np.float32), decoding)))["map"]
        for probs, target in predictions
    ]
    return float(np.mean(each))


def tune(predictions: Predictions, start: Decoding) -> tuple[Decoding, float]:
    """The decoding of highest mean AP, a mean over images; one level after the other.

    Args:
        predictions: See `Predictions`.
        start: Where to start; a level stays there unless another one is better.

    Returns:
        The decoding and its mean AP.
    """
    score = cache(partial(mean_ap, predictions))
    best = start
    names = [name for name in CANDIDATES if name != "marker" or len(predictions[0][0]) > 1]
    for name in tqdm(names * ROUNDS, "Tuning", leave=False, disable=None):
        # The one at hand comes first, so that it stays where another is just as good.
        best = max([best, *(replace(best, **{name: v}) for v in CANDIDATES[name])], key=score)
    return best, score(best)


def _flags(decoding: Decoding) -> str:
    return " ".join(f"--decode.{name} {getattr(decoding, name):g}" for name in CANDIDATES)
