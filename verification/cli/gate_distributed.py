"""The options of `mxref gate --distributed`, which judges a training step on several ranks: see `own.gate_steps`."""

from __future__ import annotations

import argparse

from mxref.verification.candidates.known import is_own
from mxref.verification.cli import UsageError

_OF_ONE_PROCESS = (
    "points", "accumulation", "covers", "full", "weights", "layers", "experts", "list", "shape", "dtype",
    "accept_baseline", "processes",
)  # fmt: skip
"""Options that say nothing of a step."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of steps."""
    ranks = parser.add_argument_group("a training step on several ranks")
    ranks.add_argument("--distributed", action="store_true", help="judge a training step in place of a layer")
    ranks.add_argument(
        "--step",
        metavar="SPEC",
        help="experts-in-parallel (default), fully-sharded or two-dimensions, which are this project's; plain, an "
        "honest one in plain PyTorch; module:callable or path/to/file.py:callable",
    )
    ranks.add_argument("--world", metavar="LIST", type=_worlds, help="numbers of ranks (default: 1,2,4; GPUs: as many)")


def check(arguments: argparse.Namespace) -> None:
    """Raise a UsageError if options of one process and of several are mixed."""
    if not arguments.distributed:
        if arguments.step is not None or arguments.world is not None:
            raise UsageError("--step and --world are for a step on several ranks: give --distributed too")
        return
    given = [name for name in _OF_ONE_PROCESS if getattr(arguments, name)]
    if not is_own(arguments.kernel):
        given.append("kernel")
    if given:
        raise UsageError(f"--{given[0].replace('_', '-')} is for a layer in one process: leave it out of --distributed")


def _worlds(text: str) -> tuple[int, ...]:
    """An argparse type: 1,2,4."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and 0 < int(part) <= 64 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of worlds; expected numbers of ranks such as 1,2,4")
    return tuple(dict.fromkeys(int(part) for part in parts))
