"""`mxref gate --distributed`: judge a training step on several ranks."""

from __future__ import annotations

import argparse

import torch

from mxref.verification.candidates.processes import Limits
from mxref.verification.cli.progress import Meter
from mxref.verification.cli.usage import UsageError
from mxref.verification.distributed.cases import CASES
from mxref.verification.distributed.judging import NoStepError
from mxref.verification.distributed.run import Named, run_gate
from mxref.verification.distributed.world import LIMITS
from mxref.verification.gate.plan import matches
from mxref.verification.gate.result import GateResult

__all__ = ["add_arguments", "check", "judge"]

_KNOWN = {
    "experts-in-parallel": "mxref.verification.distributed.shipped:ExpertsInParallel",
    "fully-sharded": "mxref.verification.distributed.shipped:FullySharded",
    "two-dimensions": "mxref.verification.distributed.shipped:OnTwoDimensions",
    "plain": "mxref.verification.studies.steps.honest:Exchanged",
}
_WORLDS = (1, 2, 4)
_OF_ONE_PROCESS = (
    "points", "accumulation", "covers", "full", "weights", "layers", "experts", "list", "rerun", "shape", "dtype",
    "record", "accept_baseline",
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
    if arguments.kernel != "shipped":
        given.append("kernel")
    if given:
        raise UsageError(f"--{given[0].replace('_', '-')} is for a layer in one process: leave it out of --distributed")


def judge(arguments: argparse.Namespace, device: torch.device) -> GateResult:
    """Judge the step.

    Raises:
        UsageError: there is no such step, no such case, or fewer GPUs than ranks.
    """
    spec = arguments.step or next(iter(_KNOWN))
    cases = [case for case in CASES if not arguments.case or matches(case.name, arguments.case)]
    if not cases:
        raise UsageError(f"no case matches; choose from {', '.join(case.name for case in CASES)}")
    present = torch.cuda.device_count() if device.type == "cuda" else max(_WORLDS)
    worlds = arguments.world or tuple(size for size in _WORLDS if size <= present)
    if device.type == "cuda" and max(worlds) > present:
        raise UsageError(f"--world {max(worlds)}: torch sees {present} CUDA GPUs, and each rank needs one of its own")
    with Meter(len(worlds) * len(cases)) as meter:
        try:
            return run_gate(
                Named.of(spec, _KNOWN),
                cases,
                worlds,
                device.type,
                seed=arguments.seed,
                strict=arguments.strict,
                limits=Limits(arguments.timeout, LIMITS.silence),
                fail_fast=arguments.fail_fast,
                narrowed=f"cases matching {' or '.join(arguments.case)}" if arguments.case else "",
                on_case=meter.advance,
            )
        except NoStepError as error:
            raise UsageError(str(error)) from None


def _worlds(text: str) -> tuple[int, ...]:
    """An argparse type: 1,2,4."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and 0 < int(part) <= 64 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of worlds; expected numbers of ranks such as 1,2,4")
    return tuple(dict.fromkeys(int(part) for part in parts))
