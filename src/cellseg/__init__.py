"""Find cell nuclei in microscope images with a U-Net."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from cellseg.model import Model

__version__ = "0.2.0"


def load(
    model: str | PathLike[str] = "nuclei-1",
    runtime: Literal["auto", "torch", "openvino", "int8"] = "auto",
) -> Model:
    """A model to use in Python: `cellseg.load("nuclei-1").predict(image)` gives labels.

    Args:
        model: The name of one that comes with the package, or a checkpoint of one's own.
        runtime: What computes the network on a CPU; `auto` is OpenVINO where it is installed,
            and `int8` OpenVINO with whole numbers, faster but not quite the same.

    Raises:
        cellseg.errors.InputError: There is no such model, or it is damaged.
    """
    from cellseg.model import Model  # here, since it takes torch seconds to load

    return Model(str(model), runtime)
