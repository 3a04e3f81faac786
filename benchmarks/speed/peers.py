"""Row 6: other programs' networks on the same image of 1,024 px, on the same cores, in turns.

Each runs in an environment of its own and waits to be asked, see `../peers`. Their weights are
random, since nothing is downloaded; that does not matter to the time of a network, and nothing but
that time is compared. Ours are those of nuclei-1, also in plain PyTorch.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cellseg
from speed.figures import Figure, ratios
from speed.setting import Setting
from speed.subjects import SHIPPED, int8, tensor
from speed.timing import in_turns, milliseconds, seconds_of

SIZE = 1024
PEERS = {"stardist": "StarDist", "cellpose": "Cellpose 3", "monai": "MONAI BasicUNet"}
OURS, INT8 = "ours, float32", "ours, int8"
EAGER, CHANNELS_LAST = "eager PyTorch", "eager PyTorch, channels_last"
BARS = {"StarDist": 1.25, "Cellpose 3": 10.0, CHANNELS_LAST: 1.5}
INT8_BAR = 2.5  # for StarDist
SCRIPTS = Path(__file__).parents[1] / "peers"

Timed = Callable[[], float]


def measure(setting: Setting) -> list[Figure]:
    """A figure for each other network."""
    image = tensor(0, SIZE)
    path = setting.folder / "peer_image.npy"
    np.save(path, image.numpy())
    with ExitStack() as stack:
        networks, versions = ours(image), {}
        for name, title in PEERS.items():
            if is_ready(setting.peers, name):
                server = stack.enter_context(serve(setting, name, path))
                networks[title], versions[title] = server
        names = list(networks)
        rounds = in_turns(setting.repeats, *networks.values())
    seconds = dict(zip(names, rounds, strict=True))
    figures = []
    for title in (*PEERS.values(), EAGER, CHANNELS_LAST):
        label, bar = f"{title} / {OURS}", BARS.get(title)
        if title in seconds:
            note = f"{_note(seconds[title], seconds[OURS])}{versions.get(title, '')}"
            figures.append(Figure(6, label, ratios(seconds[title], seconds[OURS]), bar, note=note))
        else:
            figures.append(Figure(6, label, bar=bar, lacking="make bench-peers first"))
    return [*figures, _int8(seconds)]


def _int8(seconds: dict[str, tuple[float, ...]]) -> Figure:
    label = f"StarDist / {INT8}"
    if INT8 not in seconds or "StarDist" not in seconds:
        missing = "int8 is not there" if INT8 not in seconds else "make bench-peers first"
        return Figure(6, label, bar=INT8_BAR, lacking=missing)
    samples = ratios(seconds["StarDist"], seconds[INT8])
    return Figure(6, label, samples, INT8_BAR, note=_note(seconds["StarDist"], seconds[INT8]))


def _note(theirs: Sequence[float], ours: Sequence[float]) -> str:
    return " of ".join(milliseconds(float(np.median(times))) for times in (theirs, ours))


def ours(image: torch.Tensor) -> dict[str, Timed]:
    """The network of nuclei-1 in all ways that there are, each as a call that gives seconds."""

    def timed(module: torch.nn.Module, image: torch.Tensor) -> Timed:
        def forward() -> None:
            with torch.inference_mode():
                module(image)

        return seconds_of(forward)

    eager = cellseg.load(SHIPPED, "torch").task.net
    plain = deepcopy(eager).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    networks = {
        OURS: timed(cellseg.load(SHIPPED).task, image),
        EAGER: timed(plain, image),
        CHANNELS_LAST: timed(eager, image.contiguous(memory_format=torch.channels_last)),
    }
    quantised = int8()
    if quantised is not None:
        networks[INT8] = timed(quantised.task, image)
    return networks


def is_ready(peers: Path, name: str) -> bool:
    """Whether `make bench-peers` has made the environment."""
    return (peers / name / ".ready").is_file()


@contextmanager
def serve(setting: Setting, name: str, image: Path) -> Iterator[tuple[Timed, str]]:
    """A peer that gives the seconds of its network when called, and what it says of itself."""
    arguments = [setting.peers / name / "bin" / "python", SCRIPTS / f"run_{name}.py", image]
    with (
        (setting.folder / f"{name}.txt").open("w") as log,
        subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        to, back = process.stdin, process.stdout

        def answer() -> Any:
            line = back.readline()
            if not line:
                raise RuntimeError(f"{name} has ended, see {log.name}")
            return json.loads(line)

        def ask() -> float:
            to.write("go\n")
            to.flush()
            return float(answer())

        try:
            yield ask, f"; {answer()}"
        finally:
            process.kill()
