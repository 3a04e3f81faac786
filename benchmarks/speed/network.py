"""Row 1: how much of the machine's arithmetic the network gets.

The network is computed as `predict` and `cellseg.load` do by default; the matrix product is
PyTorch's, in float32, with as many threads.
"""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import cellseg
from speed.figures import Figure, ratios
from speed.setting import Setting
from speed.subjects import model, tensor
from speed.timing import in_turns, seconds_of

WIDTHS = (16, 32, 64)
SIZES = (256, 512, 1024)
BARS = {(16, 512): 0.70, (32, 512): 0.85, (64, 512): 0.85}
SIDE = 4096  # of the matrices: larger ones are multiplied no faster


def measure(setting: Setting) -> list[Figure]:
    """A figure for each width and size."""
    left, right = torch.rand(SIDE, SIDE), torch.rand(SIDE, SIDE)
    out = torch.empty(SIDE, SIDE)
    product = seconds_of(lambda: torch.mm(left, right, out=out))
    of_numpy = seconds_of(lambda: np.matmul(left.numpy(), right.numpy(), out=out.numpy()))
    work = 2 * SIDE**3
    figures = []
    for width in WIDTHS:
        task = cellseg.load(model(width, setting.folder)).task
        for size in (512,) if setting.quick else SIZES:
            image = tensor(0, size)

            def forward(image: Tensor = image, task: torch.nn.Module = task) -> None:
                with torch.inference_mode():
                    task(image)

            flops = count(task.net, image)
            ours, peak = in_turns(setting.repeats, seconds_of(forward), product)
            rates = [np.divide(flops, ours) / 1e9, np.divide(work, peak) / 1e9]
            figures.append(
                Figure(
                    1,
                    f"{width} channels, {size:,} px",
                    ratios(*rates),
                    BARS.get((width, size)),
                    note="{:.0f} of {:.0f} GFLOP/s".format(*map(np.median, rates)),
                )
            )
    # No bar, but a row that would be met by a slow product should not hide it.
    ours, other = in_turns(setting.repeats, product, of_numpy)
    return [*figures, Figure(1, "NumPy's product / PyTorch's", ratios(ours, other))]


def count(net: nn.Module, image: Tensor) -> int:
    """Floating-point operations of one forward pass, counted without computing it."""
    counter = FlopCounterMode(display=False)
    with counter:
        deepcopy(net).to("meta")(image.to("meta"))
    return counter.get_total_flops()
