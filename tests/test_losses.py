from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import Tensor

from cellseg.nn.losses import DiceBCELoss

DICE = DiceBCELoss(dice_weight=1.0, bce_weight=0.0)
BCE = DiceBCELoss(dice_weight=0.0, bce_weight=1.0)
BOTH = DiceBCELoss()
WEIGHTS = pytest.mark.parametrize("loss", [DICE, BCE, BOTH], ids=["dice", "bce", "both"])


def example(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    # Images of very different density, on which Dice by image and by batch disagree.
    density = torch.rand(*shape[:2], 1, 1, generator=generator) ** 2
    target = (torch.rand(shape, generator=generator) < density).float()
    return 3 * torch.randn(shape, generator=generator) + target, target


def closed_form(logits: Tensor, target: Tensor) -> tuple[float, float]:
    x, t = logits.double().numpy(), target.double().numpy()
    p = 1 / (1 + np.exp(-x))
    dice = [
        1 - (2 * (p[place] * t[place]).sum() + 1) / (p[place].sum() + t[place].sum() + 1)
        for place in np.ndindex(x.shape[:2])
    ]
    return float(np.mean(dice)), float(-(t * np.log(p) + (1 - t) * np.log(1 - p)).mean())


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (4, 1, 9, 13), (3, 2, 8, 8)])
def test_dice_and_its_gradient_are_those_of_monai(shape: tuple[int, ...]) -> None:
    oracle = DiceLoss(sigmoid=True, smooth_nr=1, smooth_dr=1, batch=False, reduction="mean")
    logits, target = example(*shape)
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, expected = DICE(one, target), oracle(other, target)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(one.grad, other.grad)


def test_dice_and_cross_entropy_are_their_closed_forms_for_soft_targets_too() -> None:
    logits, target = example(3, 2, 8, 8)
    soft = 0.8 * target + 0.1
    dice, bce = closed_form(logits, soft)
    assert DICE(logits, soft).item() == pytest.approx(dice, rel=1e-5)
    assert BCE(logits, soft).item() == pytest.approx(bce, rel=1e-5)


def test_weights_of_pixels_scale_the_cross_entropy_alone() -> None:
    logits, target = example(2, 2, 8, 8)
    weight = torch.ones_like(target)
    weight[0, 1, 2, 3] = 11.0
    pixel = F.binary_cross_entropy_with_logits(logits[0, 1, 2, 3], target[0, 1, 2, 3])
    more = 10 * pixel / target.numel()
    torch.testing.assert_close(BOTH(logits, target, weight), BOTH(logits, target) + more)


def test_without_dice_it_is_torchs_cross_entropy_bit_for_bit() -> None:
    logits, target = example(4, 1, 32, 32)
    assert torch.equal(BCE(logits, target), F.binary_cross_entropy_with_logits(logits, target))


@pytest.mark.parametrize("weights", [(0.3, 0.7), (2.0, 1.0), (1.0, 5.0)])
def test_weights_add_linearly(weights: tuple[float, float]) -> None:
    logits, target = example(2, 1, 16, 16)
    expected = weights[0] * DICE(logits, target) + weights[1] * BCE(logits, target)
    torch.testing.assert_close(DiceBCELoss(*weights)(logits, target), expected)


@pytest.mark.parametrize("weights", [(0, 0), (-1, 1), (1, -1), (-1, 3), (3, -1)])
def test_weights_that_are_negative_or_all_zero_are_refused(weights: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=f"dice_weight={weights[0]}, bce_weight={weights[1]}"):
        DiceBCELoss(*weights)


@WEIGHTS
@pytest.mark.parametrize("value", [255.0, 1.001, -0.001, math.nan, math.inf, -math.inf])
def test_a_target_that_leaves_0_to_1_is_refused(loss: DiceBCELoss, value: float) -> None:
    logits, target = example(2, 1, 8, 8)
    target[1, 0, 3, 4] = value
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        loss(logits, target)


def test_a_0_to_255_mask_is_refused_as_bytes_and_its_boolean_is_not() -> None:
    logits, target = example(2, 1, 8, 8)
    with pytest.raises(ValueError, match="got 0 to 255"):
        BOTH(logits, (255 * target).to(torch.uint8))
    assert torch.equal(BOTH(logits, target.bool()), BOTH(logits, target))


@WEIGHTS
@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 1, 8, 8), (2, 1, 8, 1), (2, 2, 8, 8)])
def test_shapes_that_only_broadcast_are_refused(loss: DiceBCELoss, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(2, 1, 8, 8\)"):
        loss(torch.zeros(2, 1, 8, 8), torch.zeros(shape))


@pytest.mark.parametrize("logit", [-30.0, -3.0, 0.0, 3.0])
def test_dice_of_an_image_without_nuclei(logit: float) -> None:
    logits = torch.full((2, 1, 10, 10), logit, requires_grad=True)
    loss = DICE(logits, torch.zeros(2, 1, 10, 10))
    p = 1 / (1 + math.exp(-logit))
    assert loss.item() == pytest.approx(1 - 1 / (100 * p + 1), abs=1e-6)
    loss.backward()
    assert logits.grad is not None
    # d/dx [1 - 1 / (sum p + 1)] of one of 100 equal pixels, of one of two images
    slope = p * (1 - p) / (100 * p + 1) ** 2 / 2
    torch.testing.assert_close(logits.grad, torch.full_like(logits, slope))


@pytest.mark.parametrize("sign", [1, -1])
def test_saturated_logits_give_finite_loss_and_gradient(sign: int) -> None:
    _, target = example(2, 1, 10, 10)
    logits = (sign * 1e4 * (2 * target - 1)).requires_grad_()
    loss = BOTH(logits, target)
    loss.backward()
    # Wrong everywhere costs 1e4 of cross-entropy, and 100 of 100 pixels of Dice.
    expected = 0 if sign == 1 else 1e4 + 1 - 1 / 101
    assert loss.item() == pytest.approx(expected, abs=1e-3)
    # The gradient of the sigmoid has vanished, that of the cross-entropy is (p - t) / pixels.
    slope = torch.zeros_like(target) if sign == 1 else (1 - 2 * target) / 200
    torch.testing.assert_close(logits.grad, slope)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow_on_a_large_image(dtype: torch.dtype) -> None:
    logits, target = example(1, 1, 2048, 2048)
    logits = logits.to(dtype).requires_grad_()
    loss = BOTH(logits, target.to(dtype))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(sum(closed_form(logits.detach(), target)), rel=1e-4)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@WEIGHTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_the_loss_in_float32(loss: DiceBCELoss, dtype: torch.dtype) -> None:
    logits, target = example(2, 1, 32, 32)
    half = logits.to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        value = loss(half, target)
    assert torch.equal(value, loss(half.float(), target))
