"""From maps to labelled nuclei; pure arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def decode(probs: NDArray[Any], threshold: float = 0.5) -> NDArray[Any]:
    """Nuclei as the 8-connected components of the thresholded foreground.

    Args:
        probs: (H, W) foreground probability.
        threshold: Above it a pixel is foreground.

    Returns:
        (H, W) labels, 0 is the background: uint16, or uint32 from 65,536 nuclei on.
    """
    from skimage.measure import label

    labels: NDArray[Any] = label(probs > threshold)
    return labels.astype(np.uint16 if labels.max() <= 65535 else np.uint32)
