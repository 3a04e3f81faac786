"""Row 4: how long the program takes before it works, over an `import lightning` alone.

`predict` is given one image of 256 px and no other flag than where to write; its first line is the
first that appears on the screen.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np

from speed.figures import Figure, ratios
from speed.setting import Setting, command
from speed.subjects import write_images
from speed.timing import in_turns, milliseconds

BARS = {"--version": 0.15, "first line": 0.15, "predict --help": 1.3, "predict, one image": 2.0}


def measure(setting: Setting) -> list[Figure]:
    """A figure for each command."""
    folder = setting.folder / "start"
    (image,) = write_images(folder, {256: 1})
    # Done anew each time, else it would only look up that it is done.
    flags = ("--output.dir", folder / "results", "--output.overwrite", "true")
    predict = command("predict", "--data.predict_dir", image, *flags)
    lightning, version, first, help_, one = in_turns(
        setting.repeats,
        to_end([sys.executable, "-c", "import lightning"]),
        to_end(command("--version")),
        to_first_line(predict),
        to_end(command("predict", "--help")),
        to_end(predict),
    )
    below = milliseconds(float(np.median(lightning)))
    return [
        Figure(
            4,
            name,
            ratios(seconds, lightning),
            bar,
            at_most=True,
            note=f"{milliseconds(float(np.median(seconds)))} of {below}",
        )
        for (name, bar), seconds in zip(BARS.items(), (version, first, help_, one), strict=True)
    ]


def to_end(arguments: Sequence[str]) -> Callable[[], float]:
    """Gives the seconds of a command."""

    def timed() -> float:
        started = perf_counter()
        subprocess.run(arguments, check=True, capture_output=True)
        return perf_counter() - started

    return timed


def to_first_line(arguments: Sequence[str]) -> Callable[[], float]:
    """Gives the seconds until a command has said something; it is not let to its end."""

    def timed() -> float:
        started = perf_counter()
        with subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            elapsed = perf_counter() - started
            process.kill()
        return elapsed

    return timed
