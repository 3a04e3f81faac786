"""The U-Net of Ronneberger et al. 2015 (https://arxiv.org/abs/1505.04597)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvModule(nn.Sequential):
    """Twice a padded 3x3 convolution with bias, ReLU and batch normalisation.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H, W).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(out_channels),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(out_channels),
        )


class UNet(nn.Module):
    """Fully convolutional U-Net: `2 * depth + 1` modules, nine at the paper's depth.

    Two things differ from the paper: the convolutions are padded, so that the output has
    the size of the input, and each ReLU is followed by batch normalisation.

    Args:
        in_channels: Channels of the image.
        out_channels: Maps that come out, as logits.
        base_channels: Channels of the first module. Each level below doubles them.
        depth: Number of 2x2 poolings.

    Raises:
        ValueError: An argument is below 1.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        base_channels: int = 64,
        depth: int = 4,
    ) -> None:
        super().__init__()
        if min(in_channels, out_channels, base_channels, depth) < 1:
            raise ValueError(
                "UNet takes whole numbers from 1 up, got "
                f"in_channels={in_channels}, out_channels={out_channels}, "
                f"base_channels={base_channels}, depth={depth}"
            )
        widths = [base_channels * 2**level for level in range(depth + 1)]
        self.depth = depth
        self.contracting = nn.ModuleList(
            ConvModule(before, after)
            for before, after in zip([in_channels, *widths], widths, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(2 * width, width, 2, stride=2) for width in reversed(widths[:-1])
        )
        self.expanding = nn.ModuleList(
            ConvModule(2 * width, width) for width in reversed(widths[:-1])
        )
        self.head = nn.Conv2d(base_channels, out_channels, 1)
        self.apply(_initialise)

    def forward(self, image: Tensor, backend: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Logits of every map at every pixel.

        Args:
            image: (N, in_channels, H, W), H and W from 1 px up.
            backend: What computes `forward_padded` instead of torch.

        Returns:
            (N, out_channels, H, W).
        """
        height, width = image.shape[-2:]
        # Pooling needs multiples of 2**depth. The border pixel is repeated to the right and
        # below (reflection would fail where the pad reaches the size), so nothing shifts.
        step = 2**self.depth
        padded = F.pad(image, (0, -width % step, 0, -height % step), mode="replicate")
        logits = (backend or self.forward_padded)(padded)
        return logits[..., :height, :width]

    def forward_padded(self, x: Tensor) -> Tensor:
        """As `forward`, of images whose sides are multiples of 2**depth."""
        skips = []
        for module in self.contracting[:-1]:
            x = module(x)
            skips.append(x)
            x = self.pool(x)
        x = self.contracting[-1](x)
        for up, module in zip(self.up, self.expanding, strict=True):
            x = module(torch.cat([skips.pop(), up(x)], dim=1))
        logits: Tensor = self.head(x)
        return logits


def _initialise(module: nn.Module) -> None:
    """He et al. 2015 (https://arxiv.org/abs/1502.01852), which the U-Net paper asks for.

    The transposed convolutions get 1 / sqrt(2) of it, since torch counts twice the inputs that
    one of their outputs has; as no ReLU follows them, that keeps the variance.
    """
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
