"""`mxref gate --distributed`: judge a training step on several ranks."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mxref.verification.candidates.known import is_own
from mxref.verification.candidates.processes import Limits
from mxref.verification.cli import UsageError
from mxref.verification.cli.progress import Meter
from mxref.verification.distributed.cases import CASES, StepItem
from mxref.verification.distributed.judging import NoStepError
from mxref.verification.distributed.registry import OWN
from mxref.verification.distributed.run import Named, run_gate
from mxref.verification.distributed.world import LIMITS
from mxref.verification.gate.plan import matches
from mxref.verification.gate.result import GateResult
from mxref.verification.records import record
from mxref.verification.records.gate_summary import gate_summary
from mxref.verification.records.kernel_sources import step_sources

_KNOWN = OWN | {"plain": "mxref.verification.studies.steps.honest:Exchanged"}
_WORLDS = (1, 2, 4)
_OF_ONE_PROCESS = (
    "points", "accumulation", "covers", "full", "weights", "layers", "experts", "list", "shape", "dtype",
    "accept_baseline", "processes",
)  # fmt: skip
"""Options that say nothing of a step."""
_NARROWING = ("world", "case", "rerun", "fail_fast")


def check(arguments: argparse.Namespace) -> None:
    """Raise a UsageError for options of one process, or if a record is asked for of less than there is to judge."""
    given = [name for name in _OF_ONE_PROCESS if getattr(arguments, name)]
    if not is_own(arguments.kernel):
        given.append("kernel")
    if given:
        raise UsageError(f"--{given[0].replace('_', '-')} is for a layer in one process: leave it out of --distributed")
    narrowed = _step(arguments) not in OWN or any(getattr(arguments, name) for name in _NARROWING)
    if arguments.record is not None and narrowed:
        raise UsageError("--record keeps every case in every world, of this project's steps; leave out what narrows it")


def judge(arguments: argparse.Namespace, device: torch.device) -> GateResult:
    """Judge the step.

    Raises:
        UsageError: there is no such step, no such case or item, or fewer GPUs than ranks.
    """
    items = [StepItem(case, size, arguments.seed) for size in _sizes(arguments, device) for case in CASES]
    patterns, identifiers = arguments.case or (), arguments.rerun or ()
    items = [item for item in items if matches(item.case.name, patterns)]
    if not items:
        raise UsageError(f"--case {' '.join(patterns)} matches nothing; choose from {', '.join(c.name for c in CASES)}")
    if unknown := [identifier for identifier in identifiers if identifier not in {item.id for item in items}]:
        raise UsageError(f"--rerun {' '.join(unknown)} matches nothing of this --seed, --world and --case")
    items = [item for item in items if not identifiers or item.id in identifiers]
    narrowed = [f"cases matching {' or '.join(patterns)}"] if patterns else []
    narrowed += [f"item {' and '.join(identifiers)}"] if identifiers else []
    with Meter(len(items)) as meter:
        try:
            return run_gate(
                Named.of(_step(arguments), _KNOWN),
                items,
                device.type,
                strict=arguments.strict,
                limits=Limits(arguments.timeout, LIMITS.silence),
                fail_fast=arguments.fail_fast,
                narrowed=", ".join(narrowed),
                on_item=meter.advance,
            )
        except NoStepError as error:
            raise UsageError(str(error)) from None


def keep(result: GateResult, arguments: argparse.Namespace, device: torch.device) -> Path:
    """Write what was found as evidence; the record's path."""
    worlds = _sizes(arguments, device)
    found = gate_summary(result) | {"worlds": list(worlds), "backend": "gloo", "devices": [result.device]}
    if device.type == "cuda":
        found["backend"] = f"nccl {'.'.join(map(str, torch.cuda.nccl.version()))}"  # type: ignore[no-untyped-call]
        found["devices"] = [torch.cuda.get_device_name(number) for number in range(max(worlds))]
    return record.write(f"steps-{_step(arguments)}", found, device, arguments.record, texts=step_sources())


def _step(arguments: argparse.Namespace) -> str:
    return arguments.step or next(iter(OWN))


def _sizes(arguments: argparse.Namespace, device: torch.device) -> tuple[int, ...]:
    """How many ranks each world has.

    Raises:
        UsageError: there are fewer GPUs.
    """
    present = torch.cuda.device_count() if device.type == "cuda" else max(_WORLDS)
    worlds: tuple[int, ...] = arguments.world or tuple(size for size in _WORLDS if size <= present)
    if device.type == "cuda" and max(worlds) > present:
        raise UsageError(f"--world {max(worlds)}: torch sees {present} CUDA GPUs, and each rank needs one of its own")
    return worlds
