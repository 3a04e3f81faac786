from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.draw import disk
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import binary_f1_score, binary_jaccard_index

from cellseg.instances import Decoding, borders, decode, encode
from cellseg.segmenter import View
from cellseg.task import SegmentationTask, warmup_cosine

pytestmark = [
    # Lightning advises loader processes, which items drawn in memory do not need.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # Lightning 2.6 asks torch 2.13 in a deprecated way.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


class Fixed(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, image: Tensor) -> Tensor:
        return self.logits


class Watch(pl.Callback):
    def __init__(self) -> None:
        self.lrs: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.lrs.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def small_task(**kwargs: Any) -> SegmentationTask:
    torch.manual_seed(0)
    return SegmentationTask(**{"base_channels": 4, "depth": 2, **kwargs})


def trainer(**kwargs: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def item(height: int = 32, width: int = 40, discs: int = 2, repeat: bool = False) -> dict[str, Any]:
    labels = np.zeros((height, width), np.int32)
    for number in range(discs):
        labels[disk((12 + 3 * number, 9 + 20 * number), 6, shape=labels.shape)] = number + 1
    rng = np.random.default_rng(height)
    image = np.clip((labels > 0) * 0.6 + rng.normal(0.2, 0.05, (3, height, width)), 0, 1)
    return {
        "image": torch.from_numpy(image.astype(np.float32)),
        "labels": torch.from_numpy(labels),
        "maps": torch.from_numpy(encode(labels)),
        "borders": torch.from_numpy(borders(labels)),
        "id": "drawn",
        "repeat": repeat,
    }


def loader(items: list[dict[str, Any]]) -> DataLoader[Any]:
    return DataLoader(items, batch_size=1)  # type: ignore[arg-type]


def fit(task: SegmentationTask, items: list[dict[str, Any]], steps: int) -> Watch:
    watch = Watch()
    trainer(max_steps=steps, limit_val_batches=0, callbacks=[watch]).fit(
        task, loader(items), loader(items)
    )
    return watch


@pytest.mark.parametrize(
    ("step", "warmup", "total", "factor"),
    [
        pytest.param(0, 9, 100, 0.1, id="first step of the warm-up"),
        pytest.param(4, 9, 100, 0.5, id="half of the warm-up"),
        pytest.param(9, 9, 100, 1, id="end of the warm-up"),
        pytest.param(0, 0, 100, 1, id="no warm-up"),
        pytest.param(20, 10, 40, 0.75, id="third of the cosine"),
        pytest.param(25, 10, 40, 0.5, id="middle of the cosine"),
        pytest.param(30, 10, 40, 0.25, id="two thirds of the cosine"),
        pytest.param(40, 10, 40, 0, id="end"),
        pytest.param(50, 10, 40, 0, id="beyond the end"),
        pytest.param(0, 100, 18, 0.1, id="first of a warm-up cut to half of the run"),
        pytest.param(9, 100, 18, 1, id="end of a warm-up cut to half of the run"),
        pytest.param(18, 100, 18, 0, id="end after a warm-up cut to half of the run"),
        pytest.param(0, 100, 1, 1, id="run of one step"),
    ],
)
def test_learning_rate_warms_up_and_falls_along_a_cosine(
    step: int, warmup: int, total: int, factor: float
) -> None:
    assert warmup_cosine(step, warmup, total) == pytest.approx(factor, abs=1e-12)


def test_a_fit_changes_the_learning_rate_at_every_step() -> None:
    watch = fit(small_task(lr=0.02, warmup_steps=3), [item(), item()], steps=10)
    cosine = [0.5 + 0.5 * math.cos(math.pi * step / 7) for step in range(7)]
    factors = [1 / 4, 2 / 4, 3 / 4, *cosine]
    assert watch.lrs == pytest.approx([0.02 * factor for factor in factors])


def test_weight_decay_shrinks_kernels_and_nothing_else() -> None:
    task = small_task(lr=0.1, weight_decay=0.5, warmup_steps=0)
    stub = SimpleNamespace(estimated_stepping_batches=10)
    task.trainer = stub  # type: ignore[assignment]
    (optimizer,), _ = task.configure_optimizers()
    for p in task.parameters():
        nn.init.uniform_(p, 1, 2)
        p.grad = torch.zeros_like(p)
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    optimizer.step()
    for name, p in task.named_parameters():
        # AdamW takes lr * weight_decay off where the gradient is zero.
        factor = 1 - 0.1 * 0.5 if p.ndim == 4 else 1
        torch.testing.assert_close(p.detach(), factor * before[name], msg=name)


@pytest.mark.parametrize("maps", [1, 2])
def test_a_few_steps_on_one_image_lower_the_loss(maps: int) -> None:
    task = small_task(out_channels=maps, lr=0.01, warmup_steps=2)
    assert task(item()["image"][None]).shape == (1, maps, 32, 40)
    losses = fit(task, [item()], steps=15).losses
    assert len(losses) == 15
    assert 0 < losses[-1] < 0.85 * losses[0]


def test_predict_step_labels_the_nuclei_of_the_network() -> None:
    labels = item()["labels"]
    task = small_task()
    logits = torch.stack([torch.where(labels > 0, 0.9, -0.4), torch.full(labels.shape, -3.0)])
    task.net = Fixed(logits[None])  # type: ignore[assignment]
    plane = item()["image"]
    task.adaptation = False, "none"
    prediction = task.predict_step({"error": "", "image": torch.stack([plane] * 3)})()
    assert prediction["labels"].shape == prediction["probs"].shape == (3, *labels.shape)
    for found, probs in zip(prediction["labels"], prediction["probs"], strict=True):
        np.testing.assert_array_equal(found > 0, labels > 0)
        np.testing.assert_allclose(probs, logits[0].sigmoid(), rtol=1e-6)
        assert found.max() == 2
    assert prediction["view"] == View(1, None, False)


def test_validation_scores_every_image_once_and_no_repeat() -> None:
    task = small_task(dice_weight=0, bce_weight=2).eval()
    items = [item(32, 40, 2), item(20, 33, 1), item(16, 16, 0)]
    task.decoding = Decoding(marker=-1, min_area=0)  # whatever an untrained network says
    losses, dices, ious = [], [], []
    for one in items:
        with torch.inference_mode():
            logits = task(one["image"][None])[0]
        target = torch.from_numpy(encode(one["labels"].numpy())).float()
        losses.append(2 * float(F.binary_cross_entropy_with_logits(logits, target)))
        found = decode(logits.sigmoid().numpy(), task.decoding)
        flat = torch.from_numpy(found > 0).int().flatten(), target[0].int().flatten()
        dices.append(float(binary_f1_score(*flat, zero_division=1)))
        ious.append(float(binary_jaccard_index(*flat, zero_division=1)))
    run = trainer()
    # The second time must not remember the first.
    for number in (3, 1):
        seen = [*items[:number], item(24, 24, 1, repeat=True)]
        (logged,) = run.validate(task, loader(seen), verbose=False)
        expected = {
            "val/loss": np.mean(losses[:number]),
            "val/dice": np.mean(dices[:number]),
            "val/iou": np.mean(ious[:number]),
        }
        assert {name: logged[name] for name in expected} == pytest.approx(expected, abs=1e-5)
        assert {"val/dice_pooled", "val/iou_pooled", "val/map"} <= logged.keys()


def test_test_logs_under_its_own_name() -> None:
    (logged,) = trainer().test(small_task(), loader([item()]), verbose=False)
    assert {name.split("/")[0] for name in logged} == {"test"}
    assert {"test/loss", "test/dice", "test/map", "test/ap50_pooled", "test/merged"} <= set(logged)


def test_images_without_nuclei_train_and_score_without_nan() -> None:
    task = small_task(lr=0.01, warmup_steps=0)
    empty = [item(discs=0), item(20, 33, discs=0)]
    watch = fit(task, empty, steps=4)
    assert all(map(math.isfinite, watch.losses))
    assert all(p.isfinite().all() for p in task.parameters())
    (logged,) = trainer().validate(task, loader(empty), verbose=False)
    assert all(map(math.isfinite, logged.values()))


def test_the_border_between_two_nuclei_counts_more_in_the_foreground_alone() -> None:
    def first_loss(border_weight: float, border: float) -> float:
        drawn = item()
        drawn["borders"] = torch.zeros(32, 40)
        drawn["borders"][1, 1] = border
        task = small_task(border_weight=border_weight)
        nn.init.zeros_(task.net.head.weight)  # a probability of a half everywhere
        return fit(task, [drawn], steps=1).losses[0]

    assert first_loss(0, 0) == first_loss(0, 0.5) == first_loss(10, 0)
    expected = 10 * 0.5 * math.log(2) / (2 * 32 * 40)
    assert first_loss(10, 0.5) - first_loss(10, 0) == pytest.approx(expected, rel=1e-3)


def test_maps_beyond_those_that_there_are_are_refused() -> None:
    with pytest.raises(ValueError, match="out_channels=3"):
        small_task(out_channels=3)


def test_flips_average_the_network_over_all_orientations() -> None:
    task = small_task().eval()
    image = item()["image"][None, ..., :24]  # not square
    logits = []
    with torch.inference_mode():
        for transposed in (False, True):
            for dims in ((), (2,), (3,), (2, 3)):
                turned = image.flip(dims)
                turned = turned.transpose(2, 3) if transposed else turned
                probs = task.probs(turned.contiguous())
                probs = probs.transpose(2, 3) if transposed else probs
                logits.append(probs.flip(dims)[0].logit().numpy())
        task.decoding = Decoding(flips=True)
        found = task.probs(image)[0].numpy()
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-np.mean(logits, axis=0))), rtol=1e-4)
    assert not np.allclose(found, 1 / (1 + np.exp(-logits[0])), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fault_26_network_and_loss_in_half_precision(dtype: torch.dtype) -> None:
    task = small_task()
    batch = {k: v[None] for k, v in item().items() if isinstance(v, Tensor)}
    full = task.loss(task(batch["image"]), task._target(batch))
    full.backward()
    exact = torch.cat([p.grad.flatten() for p in task.parameters() if p.grad is not None])
    task.zero_grad()
    with torch.autocast("cpu", dtype):
        half = task.loss(task(batch["image"]), task._target(batch))
    half.backward()
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), rel=0.02)
    found = torch.cat([p.grad.flatten() for p in task.parameters() if p.grad is not None])
    assert found.isfinite().all()
    assert F.cosine_similarity(found, exact, dim=0) > 0.98


def test_hyperparameters_build_the_same_network_again() -> None:
    task = small_task(depth=1, lr=0.5)
    again = SegmentationTask(**task.hparams)
    again.load_state_dict(task.state_dict())
    assert (again.lr, again.net.depth, again.net.head.in_channels) == (0.5, 1, 4)


def test_batch_normalisation_may_stay_as_the_weights_to_start_from_had_it() -> None:
    def norms(freeze: bool) -> tuple[Tensor, bool]:
        task = small_task(freeze_norm=freeze)
        before = {name: value.clone() for name, value in task.state_dict().items()}
        fit(task, [item()], steps=2)
        kinds = ("running_mean", "running_var", "num_batches_tracked")
        after = {k: v for k, v in task.state_dict().items() if k.endswith(kinds)}
        learned = not torch.equal(task.net.head.weight, before["net.head.weight"])
        return torch.stack([(before[k] != v).any() for k, v in after.items()]), learned

    changed, learned = norms(freeze=True)
    assert learned and not changed.any()
    changed, learned = norms(freeze=False)
    assert learned and changed.all()
