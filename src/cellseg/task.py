"""The LightningModule: the network, its loss, its metrics and its optimiser joined."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import MeanMetric

from cellseg.adapt import DIAMETER
from cellseg.checkpoint import Stored, read, refuse_other, resolve
from cellseg.errors import InputError
from cellseg.instances import MAPS, Decoding, decode
from cellseg.metrics import Scores, compare
from cellseg.nn.losses import DiceBCELoss
from cellseg.nn.unet import UNet
from cellseg.resuming import count_steps, take_rates
from cellseg.segmenter import Segmenter

MAIN_SCORES = ("dice", "iou", "dice_pooled", "iou_pooled", "ap50", "map", "f1", "pq", "aji")
# By name what a training logs, its dashboard included.
LOGGED = (
    *("train/loss", "train/lr", "train/images_per_second"),
    *(f"val/{name}" for name in ("loss", *MAIN_SCORES)),
)


class SegmentationTask(pl.LightningModule):
    """Learns with a U-Net to tell nuclei from background and from each other.

    Args:
        out_channels: Maps that the U-Net predicts: 2 are foreground and the contours between
            touching nuclei, 1 is the foreground alone, as in the paper.
        base_channels: Channels of the U-Net's first module; 64 is the paper's width, 16 is
            fast without a GPU.
        depth: Number of poolings of the U-Net; 4 is the paper's.
        dice_weight: Weight of the Dice loss.
        bce_weight: Weight of the binary cross-entropy.
        border_weight: How much more the background between two nuclei counts in the
            cross-entropy of the foreground, w0 of the paper.
        lr: Highest learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        warmup_steps: Steps over which the learning rate rises from 0. It then falls to 0
            along a cosine until the last step.
        freeze_norm: Leave the means and variances of the batch normalisation as they are, which
            the weights to start from were trained with. Small batches then do no harm.
        weights: Model to start from: the name of one that comes with the package, such as
            `nuclei-1`, or a file. On the command line it brings its own architecture.
    """

    def __init__(
        self,
        out_channels: int = len(MAPS),
        base_channels: int = 64,
        depth: int = 4,
        dice_weight: float = 1.0,
        bce_weight: float = 1.0,
        border_weight: float = 10.0,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        warmup_steps: int = 100,
        freeze_norm: bool = False,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if not (min(warmup_steps, border_weight, weight_decay) >= 0 and 0 < lr < math.inf):
            raise ValueError(
                f"lr={lr}, weight_decay={weight_decay}, warmup_steps={warmup_steps}, "
                f"border_weight={border_weight}: the first must be positive, none negative"
            )
        if not 1 <= out_channels <= len(MAPS):
            raise ValueError(f"out_channels={out_channels}, but it must be 1 to {len(MAPS)}")
        # The weights become those of the run: nothing is to read the file again.
        self.save_hyperparameters(ignore=["weights"])
        self.net = UNet(out_channels=out_channels, base_channels=base_channels, depth=depth)
        # Faster on CPUs and on tensor cores; results are the same.
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.loss = DiceBCELoss(dice_weight, bce_weight)
        self.out_channels = out_channels
        self.depth = depth
        self.border_weight = border_weight
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.freeze_norm = freeze_norm
        self.schedule: torch.optim.lr_scheduler.LambdaLR | None = None  # where it is that of `lr`
        self.total_steps = math.inf  # of a training, as far as its end is known
        self.eval_loss = MeanMetric(nan_strategy="disable")
        self.eval_scores = Scores()
        # Not hyper-parameters: they are tuned when training ends.
        self.decoding = Decoding()
        self.diameter = DIAMETER  # of the nuclei it was trained on
        self.ranges: dict[str, list[float]] | None = None  # for int8, see `nn.int8`
        # --data.invert and --data.diameter; set by `application`.
        self.adaptation: tuple[bool | str, float | str] = ("auto", "auto")
        # Outside of training another runtime may compute the network, see `runtime`; and on a
        # GPU images are computed together, and decoded elsewhere, see `Batches` and `Lanes`.
        self.backend: Callable[[Tensor], Tensor] | None = None
        self.batches: Callable[[Tensor], Tensor] | None = None
        self.decode_aside: Callable[[NDArray[Any], Decoding], NDArray[Any]] = decode
        # The weights that training started from, for `Tuning`; None where there were none.
        self.initial_weights: dict[str, Tensor] | None = None
        if weights:
            stored = read(resolve(weights))
            self.adopt(stored, weights)
            self.initial_weights = stored.weights

    def forward(self, image: Tensor) -> Tensor:
        """Logits (N, out_channels, H, W) of normalised images (N, 3, H, W)."""
        image = image.contiguous(memory_format=torch.channels_last)
        other_runtime = self.backend is not None and image.is_cpu
        logits: Tensor = self.net(image, self.backend) if other_runtime else self.net(image)
        return logits

    def on_train_start(self) -> None:
        self.total_steps = count_steps(self.trainer)
        if self.schedule is not None:
            # Lightning's `LearningRateFinder` sets `lr` when the schedule is there already.
            self.schedule.base_lrs = [self.lr for _ in self.schedule.base_lrs]
        if self.freeze_norm:  # Lightning keeps the mode of each module
            for module in self.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.eval()

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        target = self._target(batch)
        weight = torch.ones_like(target)
        weight[:, 0] += self.border_weight * batch["borders"]
        loss: Tensor = self.loss(self(batch["image"]), target, weight)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any] | None:
        return self._evaluate(batch)

    def test_step(self, batch: dict[str, Any]) -> dict[str, Any] | None:
        return self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def predict_step(self, batch: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        """How to find the nuclei of one file (see `FileDataset`).

        Returns:
            A function, since two files are worked on at a time, see `Lanes`. It gives the `view`
            that the network had of the file, and `labels` (P, H, W) and `probs` (P, H, W) of the
            foreground, or of a large image `maps`, a function that gives those of a plane (see
            `tiles.stitch`).
        """
        return partial(self.segmenter(), batch, *self.adaptation)

    def segmenter(self, whole: Callable[[Tensor], Tensor] | None = None) -> Segmenter:
        """What finds nuclei with this network as it is now; see `Segmenter`."""
        device = self.device.type
        # In another thread, the network computes as precisely as it does in this one.
        precision = partial(
            torch.autocast,
            device,
            torch.get_autocast_dtype(device),
            torch.is_autocast_enabled(device),
        )
        return Segmenter(
            network=self.probs,
            whole=whole or self.batches or self.probs,
            precision=precision,
            depth=self.depth,
            diameter=self.diameter,
            decoding=self.decoding,
            decode=self.decode_aside,
        )

    def probs(self, image: Tensor) -> Tensor:
        """Probabilities (N, out_channels, H, W) of whole images (N, 3, H, W)."""
        image = image.to(self.device).type(self.dtype)
        return self._whole_image_logits(image).float().sigmoid()

    def configure_optimizers(self) -> Any:
        # Biases and batch normalisation are not decayed: shrinking them does not regularise.
        decayed = [p for p in self.parameters() if p.ndim > 1]
        kept = [p for p in self.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "decayed": True},
            {"params": kept, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            groups,
            lr=self.lr,
            weight_decay=self.weight_decay,
        )
        self.total_steps = self.trainer.estimated_stepping_batches
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, self.warmup_steps, self.total_steps)
        )
        return [optimizer], [{"scheduler": self.schedule, "interval": "step"}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep how maps become nuclei, and how they did where this training was scored.

        `Tuning` changes the first at the end; a run that goes on compares with the second.
        """
        checkpoint["decoding"] = checkpoint["scored_with"] = asdict(self.decoding)
        if self.initial_weights is not None:
            checkpoint["initial_weights"] = self.initial_weights

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with a training, but with the learning rate and weight decay of this run."""
        if self._trainer is None or not self.trainer.training:
            return
        self.decoding = Decoding(**checkpoint["scored_with"])
        self.initial_weights = checkpoint.get("initial_weights")
        take_rates(checkpoint, self.lr, self.weight_decay)

    def adopt(self, stored: Stored, name: str) -> None:
        """Become a model on disk, which errors call by its name.

        Raises:
            InputError: It is of another architecture.
        """
        refuse_other(stored.weights, self, name)
        self.load_state_dict(stored.weights)
        self.decoding, self.diameter = stored.decoding, stored.diameter
        self.ranges = stored.ranges

    def _whole_image_logits(self, image: Tensor) -> Tensor:
        """Logits as `forward` gives them, but of background where an image has no contrast."""
        blank = image.amax((1, 2, 3)) == image.amin((1, 2, 3))
        logits: Tensor = self._over_orientations(image) if self.decoding.flips else self(image)
        return logits.masked_fill(blank[:, None, None, None], -10.0)

    def _over_orientations(self, image: Tensor) -> Tensor:
        """Mean logits over the quarter turns of the images and of their mirror images."""
        logits = []
        for turns in range(4):
            turned = image.rot90(turns, (2, 3))
            logits += [self(turned).rot90(-turns, (2, 3))]
            logits += [self(turned.flip(3)).flip(3).rot90(-turns, (2, 3))]
        return torch.stack(logits).mean(0)

    def _target(self, batch: dict[str, Any]) -> Tensor:
        maps: Tensor = batch["maps"][:, : self.out_channels]
        return maps.float()

    def _evaluate(self, batch: dict[str, Any]) -> dict[str, Any] | None:
        """What callbacks show of an image: `probs` (C, H, W), `preds` (H, W) and its `sums`."""
        logits = self._whole_image_logits(batch["image"])
        if batch["repeat"].any():  # it belongs to another process, see `samplers.Share`
            return None
        target = self._target(batch)
        self.eval_loss.update(self.loss(logits, target, torch.ones_like(target)))
        probs = logits.float().sigmoid()
        if self.trainer.state.fn == "fit":
            preds = decode(probs[0].cpu().numpy(), self.decoding)
        else:
            preds = self._found(batch["image"].float(), probs)
        sums = compare(batch["labels"][0].cpu().numpy(), preds)
        self.eval_scores.update(sums)
        return {"probs": probs[0], "preds": preds, "sums": sums}

    def _found(self, image: Tensor, probs: Tensor) -> NDArray[Any]:
        """The labels (H, W) that `predict` finds in an image (1, 3, H, W) of known probs."""

        def network(other: Tensor) -> Tensor:
            # The image as it is comes back as the same object, not to be computed again.
            return probs if other is image else self.probs(other)

        return self.segmenter(network).find(image, *self.adaptation)[1].labels

    def _log_scores(self, stage: str) -> None:
        # Metrics sum over the processes themselves, also those that had no image.
        scores, loss = self.eval_scores.compute(), self.eval_loss.compute()
        if self.trainer.state.fn == "fit":  # the dashboard shows the main ones
            if not loss.isfinite():
                raise InputError(
                    "the loss is no longer a number: a smaller --model.lr, or --trainer.precision "
                    "bf16-mixed"
                )
            scores = {name: scores[name] for name in MAIN_SCORES}
        for name, score in {"loss": loss, **scores}.items():
            self.log(f"{stage}/{name}", score, prog_bar=stage == "val" and name == "map")
        self.eval_loss.reset()
        self.eval_scores.reset()


def warmup_cosine(step: int, warmup: float, total: float) -> float:
    """Factor of the learning rate: linear from 0 to 1, then half a cosine down to 0.

    Without an end, `total` being infinite, it stays at 1.
    """
    if total < math.inf:
        warmup = min(warmup, total // 2)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))
