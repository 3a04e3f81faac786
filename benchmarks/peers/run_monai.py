"""MONAI's BasicUNet at its default width, under its sliding window."""

from __future__ import annotations

import sys

from server import serve  # first: it takes the output stream for the answers

# isort: split
import monai
import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import BasicUNet

network = BasicUNet(spatial_dims=2, in_channels=3, out_channels=2).eval()
window = SlidingWindowInferer(roi_size=(256, 256), sw_batch_size=4, overlap=0.25)
image = torch.from_numpy(np.load(sys.argv[1]))


def forward() -> None:
    """One image."""
    with torch.inference_mode():
        window(image, network)


serve(f"MONAI {monai.__version__}, PyTorch {torch.__version__}, random weights", forward)
