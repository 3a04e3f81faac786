"""Cellpose's network as its nuclei model has it, under its tiles of 224 px, ten percent shared."""

from __future__ import annotations

import sys

from server import serve  # first: it takes the output stream for the answers

# isort: split
from importlib.metadata import version

import numpy as np
import torch
from cellpose.core import check_mkl, run_net
from cellpose.resnet_torch import CPnet

# As `cellpose.models.CellposeModel` makes it without a GPU; the nuclei have 17 px.
network = CPnet([2, 32, 64, 128, 256], nout=3, sz=3, mkldnn=check_mkl(), diam_mean=17.0)
image = np.load(sys.argv[1])[0, :2].transpose(1, 2, 0)[None]  # (1, H, W, 2)

serve(
    f"Cellpose {version('cellpose')}, PyTorch {torch.__version__}, random weights",
    lambda: run_net(network, image),
)
