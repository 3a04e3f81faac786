"""Makes a released model of a checkpoint.

python -m cellseg.release CKPT FILE.safetensors [KEY=VALUE ...]

FILE takes the weights in half precision; a JSON beside it all else that the checkpoint says, and
the facts that are given, such as `licence=CC0`.
"""

from __future__ import annotations

import hashlib
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path

from cellseg.atomic import draft, write_json
from cellseg.checkpoint import read, resolve
from cellseg.cli import carry_out, set_up_logging
from cellseg.errors import InputError


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; see the module.

    Args:
        args: As on the command line; by default what the process was started with.

    Returns:
        The exit code, see `cli.main`.
    """
    set_up_logging()
    parser = ArgumentParser(
        prog="python -m cellseg.release",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="What `fit` wrote.")
    parser.add_argument("target", metavar="FILE", type=Path, help="Ends in .safetensors.")
    parser.add_argument("facts", metavar="KEY=VALUE", nargs="*", help="What else the JSON says.")
    given = parser.parse_args(args)

    def work() -> int:
        if given.target.suffix != ".safetensors":
            raise InputError(f"{given.target}: a released model ends in .safetensors")
        if bare := [fact for fact in given.facts if "=" not in fact]:
            raise InputError(f"{bare[0]}: a fact is KEY=VALUE")
        about = dict(fact.split("=", 1) for fact in given.facts)
        release(resolve(given.checkpoint), given.target, {"name": given.target.stem, **about})
        return 0

    return carry_out(work)


def release(ckpt_path: Path, target: Path, about: Mapping[str, str]) -> None:
    """Write a checkpoint as a released model.

    Args:
        ckpt_path: What `fit` wrote.
        target: The `.safetensors` file; a `.json` goes beside it.
        about: What else the JSON says.

    Raises:
        InputError: The checkpoint cannot be read.
        OutputError: The model's folder cannot be written.
    """
    from safetensors.torch import save

    stored = read(ckpt_path)
    # The running variances of batch normalisation may leave the range of half precision.
    content = save(
        {
            name: (value.half() if value.ndim > 1 else value).contiguous()
            for name, value in stored.weights.items()
        }
    )
    facts = {
        **about,
        "sha256": hashlib.sha256(content).hexdigest(),
        "settings": stored.settings,
        "split": stored.split,
        "diameter": stored.diameter,
        "ranges": stored.ranges,
    }
    with draft(target) as name:
        name.write_bytes(content)
    write_json(target.with_suffix(".json"), facts)


if __name__ == "__main__":
    sys.exit(main())
