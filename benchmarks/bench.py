"""How fast cellseg is, in figures that compare it with something on the same machine.

    python benchmarks/bench.py [--rows 1,4] [--quick]

Seven rows, explained in `docs/performance.md`; each is a module in `speed/`. Prints a table, writes
JSON, and exits with 1 where a row misses its bar or was not run. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cellseg.cores import use_granted_cores
from speed import accuracy, fit, memory, network, peers, predict, start
from speed.figures import ROWS, Figure, as_json, last_line, rows_met, table
from speed.setting import Setting, describe_machine

REPOSITORY = Path(__file__).resolve().parents[1]
MEASURES: dict[int, Callable[[Setting], list[Figure]]] = {
    1: network.measure,
    2: predict.measure,
    3: fit.measure,
    4: start.measure,
    5: memory.measure,
    6: peers.measure,
    7: accuracy.measure,
}


def main() -> int:
    """Measure, print and write."""
    options = _options()
    folder = options.json.parent / "work"
    folder.mkdir(parents=True, exist_ok=True)
    # For this process and those that it starts; the user's cache stays as it is.
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    use_granted_cores()
    data = options.data if options.data.exists() else None
    repeats = 1 if options.quick else 5
    setting = Setting(folder, options.peers, data, repeats, options.quick)
    results: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "quick": options.quick,
        "repeats": repeats,
        "machine": describe_machine(),
    }
    figures: list[Figure] = []
    for row in options.rows:
        started = time.monotonic()
        print(f"{row} {ROWS[row]} …", end="", file=sys.stderr, flush=True)
        figures += _measure(row, setting)
        print(f" {time.monotonic() - started:.0f} s", file=sys.stderr)
        content = {**results, "rows_met": rows_met(figures), "figures": as_json(figures)}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    _print(results, figures, options.json)
    return 0 if len(rows_met(figures)) == len(ROWS) else 1


def _measure(row: int, setting: Setting) -> list[Figure]:
    try:
        return MEASURES[row](setting)
    except Exception as error:  # it must not cost the minutes of the other rows
        traceback.print_exc()
        return [Figure(row, "failed", lacking=f"{type(error).__name__}: {error}")]


def _print(results: dict[str, Any], figures: list[Figure], path: Path) -> None:
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    print(
        f"{machine['processor']}; {machine['cores']} cores granted, {machine['threads']} threads, "
        f"{machine['memory_gib']:g} GiB; {machine['system']}; load before {machine['load_before']}"
    )
    print(f"{versions}\n{results['date']}, {results['repeats']} repeats in turns, {path}\n")
    print(table(figures))
    if results["quick"]:
        print("\nquick: too few images and repeats for figures to go by")
    print(f"\n{last_line(figures)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="How fast cellseg is.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--rows", type=_rows, default=",".join(map(str, ROWS)), help="which to run, as 1,4"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one repeat on little, to try the benchmark"
    )
    parser.add_argument(
        "--json", type=Path, default=REPOSITORY / "build/bench/results.json", help="results"
    )
    parser.add_argument(
        "--peers", type=Path, default=REPOSITORY / "build/peers", help="made by make bench-peers"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=REPOSITORY.parent / "shared/data/dsb2018/stage1_train.zip",
        help="the Data Science Bowl's images, for row 7",
    )
    return parser.parse_args()


def _rows(text: str) -> list[int]:
    rows = sorted({int(part) for part in text.split(",")})
    if not set(rows) <= set(ROWS):
        raise argparse.ArgumentTypeError(f"rows are 1 to {len(ROWS)}")
    return rows


if __name__ == "__main__":
    sys.exit(main())
