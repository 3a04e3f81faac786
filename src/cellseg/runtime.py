"""What computes the network on a CPU: torch, or OpenVINO where that is installed."""

from __future__ import annotations

import atexit
import gc
import hashlib
import os
import shutil
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from cellseg.errors import InputError
from cellseg.nn.int8 import quantised
from cellseg.nn.unet import UNet

RuntimeName = Literal["auto", "torch", "openvino", "int8"]
HELP = (
    "What computes the network on a CPU: torch; openvino, about twice as fast and with the same "
    "nuclei, from the extra of that name; int8, openvino with whole numbers, faster still, with "
    "nuclei that differ a little; or auto, openvino where it can be had."
)


class Runtime(pl.Callback):
    """Lets another runtime than torch compute the network, outside of training.

    Args:
        runtime: See `HELP`.
    """

    def __init__(self, runtime: RuntimeName = "auto") -> None:
        self.runtime = runtime

    def choose(self, trainer: pl.Trainer, pl_module: Any) -> str:
        """The runtime in force.

        Raises:
            InputError: OpenVINO is asked for and cannot be had.
        """
        if not isinstance(pl_module.net, UNet):  # one's own task may have any network
            if self.runtime in ("openvino", "int8"):
                raise InputError(
                    f"--predict.runtime {self.runtime} computes the U-Net of cellseg; leave it out"
                )
            return "torch"
        on_cpu = trainer.strategy.root_device.type == "cpu"
        single_precision = trainer.precision == "32-true"
        return choose(self.runtime, on_cpu and single_precision, pl_module.ranges)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # Only now are the weights of a checkpoint in place.
        cache_dir = trainer.datamodule.cache_dir  # type: ignore[attr-defined]
        pl_module.backend = backend_for(self.choose(trainer, pl_module), pl_module, cache_dir)

    on_test_start = on_validation_start = on_predict_start


def choose(runtime: RuntimeName, single_precision_on_cpu: bool, ranges: object = None) -> str:
    """`torch`, `openvino` or `int8`; see `Runtime`. The model's `ranges` are for int8."""
    if runtime not in get_args(RuntimeName):
        raise InputError(f"runtime {runtime!r}: must be one of {', '.join(get_args(RuntimeName))}")
    if runtime == "torch":
        return runtime
    installed = find_spec("openvino") is not None
    if runtime == "auto":
        return "openvino" if installed and single_precision_on_cpu else "torch"
    if not installed:
        raise InputError(f"--predict.runtime {runtime} needs OpenVINO: pip install openvino")
    if not single_precision_on_cpu:
        raise InputError(
            f"--predict.runtime {runtime} computes on CPUs in single precision; leave out "
            "--trainer.accelerator and --trainer.precision, or take torch"
        )
    if runtime == "int8" and not ranges:
        raise InputError(
            "--predict.runtime int8 needs the ranges of the model's activations; measure them "
            "once on its training images: python -m cellseg.quantise MODEL --data.root DIR"
        )
    return runtime


def backend_for(runtime: str, task: Any, cache_dir: Path) -> Callable[[Tensor], Tensor] | None:
    """What computes `task.net.forward_padded` instead of torch; see `choose`."""
    if runtime == "torch":
        return None
    net = quantised(task.net, task.ranges) if runtime == "int8" else task.net
    return compile_network(net, cache_dir)


def compile_network(net: UNet, cache_dir: Path) -> Callable[[Tensor], Tensor]:
    """`net.forward_padded`, computed by OpenVINO on the CPU.

    Args:
        net: With the weights to use.
        cache_dir: Where the converted network is kept.
    """
    openvino = _openvino()
    digest = hashlib.sha256(openvino.__version__.encode())
    for name, value in net.state_dict().items():
        digest.update(f"{name}{tuple(value.shape)}".encode() + value.numpy().tobytes())
    folder = cache_dir / "openvino" / digest.hexdigest()[:16]
    if not folder.exists():
        try:
            _convert(net, folder)
        except (OSError, RuntimeError):  # it cannot be kept, as where the disk is full
            folder = Path(tempfile.mkdtemp(prefix="cellseg-")) / "openvino"
            atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
            _convert(net, folder)
    core = _core()
    free: dict[int, list[Any]] = defaultdict(list)

    def compute(image: Tensor) -> Tensor:
        # Threads that compute side by side, see `Lanes`, need one compiled network each, with as
        # many threads of its own as torch may use there.
        threads = torch.get_num_threads()
        try:
            compiled = free[threads].pop()
        except IndexError:
            hints = {
                "INFERENCE_PRECISION_HINT": "f32",
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": threads,
                "ENABLE_CPU_PINNING": False,  # all would be pinned to the same cores
            }
            compiled = core.compile_model(folder / "net.xml", "CPU", hints)
        logits = torch.from_numpy(compiled(image.contiguous().numpy(), share_inputs=True)[0])
        free[threads].append(compiled)
        return logits

    return compute


def _convert(net: UNet, folder: Path) -> None:
    """Put the network into OpenVINO's form, for images of any size."""
    openvino = _openvino()

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, image: Tensor) -> Tensor:
            return net.forward_padded(image)

    example = torch.zeros(1, 3, 2**net.depth, 2**net.depth)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its own use of `torch.jit.trace`
        model = openvino.convert_model(
            Padded().eval(), example_input=example, input=[-1, 3, -1, -1]
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        made = Path(name) / folder.name  # unlike the other, others may read it
        made.mkdir()
        openvino.save_model(model, made / "net.xml", compress_to_fp16=False)
        with suppress(OSError):  # another process was first
            os.replace(made, folder)


@cache
def _core() -> Any:
    """OpenVINO's core, one for ever.

    Its CPU plugin gives the thread that makes it a stack for signals, and takes the memory back
    when it goes, perhaps in another thread: the next signal would then end the process.
    """
    return _openvino().Core()


@cache
def _openvino() -> Any:
    # It reports home when imported; without it OpenVINO takes a stub.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    # Its table of types is made at the first use, under a lock and Python's: two threads that come
    # at once would wait for each other for ever.
    openvino.Type.f32.to_dtype()
    # A loader process inherits the compiled network by its fork, but not the network's threads:
    # freeing the network, it would wait for them for ever.
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=gc.freeze)
    return openvino
