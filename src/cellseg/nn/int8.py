"""The U-Net in eight bits: what its activations range over, and a copy that rounds to that.

Quantisation after training, as in Jacob et al. 2018 (https://arxiv.org/abs/1712.05877): weights
are rounded to 127 levels of each output channel, activations to 256 of each layer, so that a
runtime may compute with whole numbers. Torch itself only simulates it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from cellseg.nn.unet import UNet


@torch.inference_mode()
def measure(net: UNet, batches: Iterable[Tensor]) -> dict[str, list[float]]:
    """The range of each activation that is rounded: its layer's name to the lowest and highest.

    They are means over images of the extremes in each. The extremes of all images are outliers:
    with them the error of nuclei-1's logits is twice as large.

    Args:
        net: The trained network.
        batches: Normalised training images (N, 3, H, W).
    """
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str, module: nn.Module, args: object, output: Tensor) -> None:
        extremes = torch.stack([output.amin((1, 2, 3)), output.amax((1, 2, 3))], dim=1)
        seen.setdefault(name, []).append(extremes.cpu())

    # Convolutions take what these give, or the maximum of it over four pixels.
    hooks = [
        module.register_forward_hook(partial(watch, name))
        for name, module in net.named_modules()
        if isinstance(module, nn.BatchNorm2d | nn.ConvTranspose2d)
    ]
    try:
        for batch in batches:
            net(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(extremes).mean(0).tolist() for name, extremes in seen.items()}


def quantised(net: UNet, ranges: Mapping[str, Sequence[float]]) -> UNet:
    """A copy that rounds its weights and activations to eight bits.

    Args:
        net: The trained network.
        ranges: From `measure`.
    """
    net, ranges = deepcopy(net), {**ranges}
    for place in range(net.depth):
        # Both parts of what is concatenated need the same levels.
        parts = (f"up.{place}", f"contracting.{net.depth - 1 - place}.5")
        lows, highs = zip(*(ranges[part] for part in parts), strict=True)
        ranges.update(dict.fromkeys(parts, (min(lows), max(highs))))
        # A transposed convolution is fast in OpenVINO only where 0 is in the middle of its range.
        below = f"expanding.{place - 1}.5" if place else f"contracting.{net.depth}.5"
        reach = max(map(abs, ranges[below]))
        ranges[below] = (-reach * 128 / 127, reach)
    for module in [*net.modules()]:
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            axis = 0 if isinstance(module, nn.Conv2d) else 1
            register_parametrization(module, "weight", RoundedWeight(module.weight, axis))
    for name, (low, high) in ranges.items():
        net.set_submodule(name, nn.Sequential(net.get_submodule(name), Rounded(low, high)))
    first = "contracting.0.0"  # images are normalised to 0 to 1
    net.set_submodule(first, nn.Sequential(Rounded(0.0, 1.0), net.get_submodule(first)))
    return net


class Rounded(nn.Module):
    """Rounds activations to 256 levels of which one is 0, that of the padding.

    Args:
        low: The lowest value; what lies below becomes it.
        high: The highest value, likewise.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max(high - low, 1e-6) / 255  # a dead layer gives nothing but 0
        # Buffers, so that they are part of the state that tells networks apart.
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("zero", torch.tensor(round(-low / scale), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, 0, 255)


class RoundedWeight(nn.Module):
    """Rounds the weight of a convolution to 127 levels of each output channel, 0 amid them.

    Twice as many would fit into a byte. But CPUs without VNNI add two products of a weight and an
    activation in 16 bits, which overflow from 2 * 65 * 255 on, and the network fails.

    Args:
        weight: Of four dimensions.
        axis: That of the output channels.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, weight: Tensor, axis: int) -> None:
        super().__init__()
        highest = weight.detach().abs().transpose(0, axis).flatten(1).amax(1)
        self.axis = axis
        self.register_buffer("scale", highest.clamp_min(1e-6) / 63)
        self.register_buffer("zero", torch.zeros(len(highest), dtype=torch.int32))

    def forward(self, weight: Tensor) -> Tensor:
        # OpenVINO computes with whole numbers where there are 255 levels, of which 127 are used.
        return torch.fake_quantize_per_channel_affine(
            weight, self.scale, self.zero, self.axis, -127, 127
        )
