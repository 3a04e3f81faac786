"""StarDist's network as its 2D_versatile_fluo model has it: 32 rays, grid 2, one channel."""

from __future__ import annotations

import sys

from server import serve  # first: it takes the output stream for the answers

# isort: split
import numpy as np
import tensorflow as tf
from stardist import __version__
from stardist.models import Config2D, StarDist2D

model = StarDist2D(Config2D(n_rays=32, grid=(2, 2), n_channel_in=1), name=None, basedir=None)
image = np.load(sys.argv[1]).mean(axis=1)[..., None]  # (1, H, W, 1)
tensor = tf.constant(image)
# Faster than `keras_model.predict`, which StarDist calls, and than XLA.
network = tf.function(lambda x: model.keras_model(x, training=False))

serve(
    f"StarDist {__version__}, TensorFlow {tf.__version__}, random weights",
    lambda: [np.asarray(maps) for maps in network(tensor)],
)
