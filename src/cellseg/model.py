"""A trained model as a Python object, on the path that `cellseg predict` takes."""

from __future__ import annotations

from typing import Any, Literal, SupportsFloat

import numpy as np
from numpy.typing import NDArray

from cellseg.checkpoint import read, resolve
from cellseg.data.cache import default_cache_dir
from cellseg.data.dataset import to_input
from cellseg.instances import Decoding, narrow
from cellseg.reading.channels import to_rgb_planes
from cellseg.reading.images import as_number
from cellseg.reading.large import LargeImage
from cellseg.reading.recording import LARGE, Recording, arrange
from cellseg.runtime import RuntimeName, backend_for, choose
from cellseg.task import SegmentationTask
from cellseg.tiles import margin_for, stitch


class Model:
    """Finds nuclei in arrays; made by `cellseg.load`.

    Args:
        model: The name of a model that comes with the package, or a checkpoint.
        runtime: See `runtime.HELP`.

    Attributes:
        task: The network with its decoding, `task.decoding`. Moved to a GPU by `task.cuda()`,
            it predicts there.
    """

    def __init__(self, model: str, runtime: RuntimeName = "auto") -> None:
        stored = read(resolve(model))
        self._named = model, runtime
        self.task = SegmentationTask(**stored.architecture).eval()
        self.task.adopt(stored, model)
        low, high = stored.settings["data.percentiles"]
        self.percentiles = (float(low), float(high))
        chosen = choose(runtime, single_precision_on_cpu=True, ranges=stored.ranges)
        self.task.backend = backend_for(chosen, self.task, default_cache_dir())

    def __reduce__(self) -> tuple[Any, ...]:
        # For processes of one's own: a network of OpenVINO stays in the process that has made it.
        return _loaded, (*self._named, self.task.decoding)

    def predict(
        self,
        image: NDArray[Any],
        diameter: float | Literal["auto", "none"] = "auto",
        invert: bool | Literal["auto"] = "auto",
    ) -> NDArray[Any]:
        """The nuclei of an image.

        Args:
            image: (H, W), or (H, W, 1 to 4) for grey, grey with alpha, RGB and RGBA; any range.
            diameter: Of the nuclei in px, see `--data.diameter`.
            invert: See `--data.invert`.

        Returns:
            (H, W) labels from 1, 0 is the background: uint16, or uint32 when needed.

        Raises:
            ValueError: The array has another shape, or a choice is none of those above.
        """
        image = np.asarray(image)
        if image.dtype.kind not in "buif":
            raise ValueError(f"an image is of whole or real numbers, got {image.dtype}")
        if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] <= 4)) or 0 in image.shape:
            raise ValueError(f"an image is (H, W) or (H, W, 1 to 4), got {image.shape}")
        is_number = isinstance(diameter, SupportsFloat)
        if diameter not in ("auto", "none") and not (is_number and float(diameter) > 0):
            raise ValueError(f"diameter={diameter!r}: must be positive, 'auto' or 'none'")
        if invert not in (True, False, "auto"):
            raise ValueError(f"invert={invert!r}: must be True, False or 'auto'")
        invert = invert if invert == "auto" else bool(invert)  # NumPy has a True of its own
        image = as_number(np.atleast_3d(image))
        colour = image.shape[2] > 2
        recording = arrange("", image if colour else image[..., :1], "YXS", colour)
        if recording.pixels[..., 0].size > LARGE:
            return self._stitched(recording, invert, diameter)
        (shown,), _ = to_rgb_planes(recording)
        tensor = to_input(shown, self.percentiles)[None].to(self.task.device)
        found = self.task.segmenter()({"image": tensor}, invert, diameter)
        return np.asarray(found["labels"][0])

    def _stitched(
        self, recording: Recording, invert: bool | str, diameter: float | str
    ) -> NDArray[Any]:
        """The nuclei of an image that is too large for the network at once."""
        large = LargeImage(recording, "all", None, self.percentiles)
        found = self.task.segmenter()({"large": large}, invert, diameter)
        shape, scale = recording.pixels.shape[1:3], found["view"].scale
        decoding = self.task.decoding.at(scale)
        strips = stitch(shape, found["maps"](0), decoding, margin_for(scale), lambda piece: None)
        labels = np.concatenate([strip.copy() for strip, _ in strips])
        return narrow(labels)


def _loaded(model: str, runtime: RuntimeName, decoding: Decoding) -> Model:
    loaded = Model(model, runtime)
    loaded.task.decoding = decoding
    return loaded
