"""How `fit --ckpt_path` goes on, step by step as if the training had not been stopped.

Who takes part, in the order of their turns:

- `BestAndLast` saves `last.ckpt` when a training is stopped, after `rewind`, so that no batch is
  left out. Lightning puts its loops, the optimiser and the callbacks into it, the task how it was
  scored, and `NucleiDataModule` its split and how many crops were taken.
- `choice.choose` finds the checkpoint. What it says of the model replaces the defaults of flags.
- `Application` goes on in the folder of the run, where that is below the root; `moved` tells
  `BestAndLast` so, which may know the folder by another name.
- `SegmentationTask` has this run's learning rate and weight decay win by `take_rates`, and asks
  `count_steps` where the schedule ends. `EndlessSampler` goes on where the crops ended.
- `Tuning.make_up` tunes where the training was stopped after its last step.

What of this depends on how Lightning keeps its state is in this module.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer


def rewind(trainer: Trainer) -> bool:
    """Set Lightning's counters back to the last step, or to the start of a stopped validation.

    A run that goes on then repeats each batch whose gradient no step has used.

    Returns:
        Whether batches will come again that the network has seen.
    """
    loop = trainer.fit_loop.epoch_loop
    batches, seen = loop.batch_progress, loop.val_loop.batch_progress
    steps = loop.automatic_optimization.optim_progress.optimizer.step.current.completed
    ahead = batches.current.ready - steps * trainer.accumulate_grad_batches
    if trainer.validating:
        # Lightning would leave out images that were scored, or the validation as a whole.
        for progress in (seen.total, seen.current):  # as within the first image
            vars(progress).update(ready=1, started=1, processed=0, completed=0)
    elif ahead > 0:
        # Lightning would leave out batches whose gradients no step has used yet.
        started = vars(batches.current)["started"]
        seen_again = started > steps * trainer.accumulate_grad_batches
        for progress in (batches.total, batches.current):
            vars(progress).update(dict.fromkeys(vars(progress), progress.ready - ahead))
        batches.is_last_batch = False  # it comes again
        return bool(seen_again)
    return False


def moved(state_dict: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The state of a `ModelCheckpoint` whose files are in another folder now."""

    def here(path: str) -> str:
        return path and str(folder / Path(path).name)

    paths = {name: here(state_dict[name]) for name in state_dict if name.endswith("_path")}
    scores = {here(path): score for path, score in state_dict["best_k_models"].items()}
    return {**state_dict, **paths, "dirpath": str(folder), "best_k_models": scores}


def take_rates(checkpoint: dict[str, Any], lr: float, weight_decay: float) -> None:
    """Let the learning rate and weight decay of this run win over those in a checkpoint.

    An optimiser or a schedule of one's own may have other rates in each group, and more of them:
    each changes by the ratio of the new `lr` to the stored one.
    """
    ratio = lr / checkpoint["hyper_parameters"]["lr"]
    for state in checkpoint["optimizer_states"]:
        for group in state["param_groups"]:
            for name in {"lr", "initial_lr", "max_lr", "min_lr"} & group.keys():
                group[name] *= ratio
            if group.get("decayed"):
                group["weight_decay"] = weight_decay
    for state in checkpoint.get("lr_schedulers", []):
        if "base_lrs" in state:
            state["base_lrs"] = [rate * ratio for rate in state["base_lrs"]]


def count_steps(trainer: Trainer) -> float:
    """The steps of a whole training, also where earlier ones took more or fewer crops.

    Lightning's estimate takes all epochs of a run that goes on to be as long as its next one.
    """
    loop = trainer.fit_loop
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        return trainer.estimated_stepping_batches
    batches, per_step = loop.epoch_loop.batch_progress, trainer.accumulate_grad_batches
    within = loop.restarted_mid_epoch and not batches.is_last_batch
    left = max(0, trainer.max_epochs - loop.epoch_progress.current.ready + within)
    steps = left * math.ceil(trainer.num_training_batches / per_step)
    steps += trainer.global_step - (batches.current.ready // per_step if within else 0)
    return steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)
