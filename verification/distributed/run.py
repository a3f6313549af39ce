"""One run of the gate on a step: every case in every world, and a verdict."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import groupby
from typing import Any

import torch

from mxref.verification.arithmetic.accumulation import ACCUMULATIONS
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.loading import find
from mxref.verification.candidates.processes import Limits
from mxref.verification.distributed.cases import StepItem
from mxref.verification.distributed.judging import describe, judge
from mxref.verification.distributed.questions import MakeStep
from mxref.verification.distributed.registry import why
from mxref.verification.distributed.world import LIMITS, World
from mxref.verification.gate.result import GateResult, describe_device

__all__ = ["Named", "run_gate"]


@dataclass(frozen=True)
class Named:
    """A step by name: `make` makes it in a rank's process, where alone its code is imported; an instance of a class."""

    name: str
    make: MakeStep

    @classmethod
    def of(cls, spec: str, known: Mapping[str, str]) -> Named:
        """`module:callable` or `path/to/file.py:callable`, or a name that is known for one of these."""
        return cls(spec, partial(_made, known.get(spec, spec), ", ".join(known)))


def _made(spec: str, known: str) -> Any:
    found = _found(spec, known)
    return found() if isinstance(found, type) else found


@cache
def _found(spec: str, known: str) -> Any:
    return find(spec, "--step", known)


def run_gate(
    step: Named,
    items: Sequence[StepItem],
    device_type: str,
    *,
    strict: bool = False,
    limits: Limits = LIMITS,
    fail_fast: bool = False,
    narrowed: str = "",
    on_item: Callable[[str], None] = lambda name: None,
) -> GateResult:
    """Judge one step.

    Args:
        step: what to judge.
        items: what it is asked, at least one; those of a world one behind the other, all drawn with one seed.
        device_type: "cpu" (gloo) or "cuda" (NCCL, a GPU a rank).
        strict: see `GateResult.exit_code`.
        limits: see `distributed.world`.
        fail_fast: stop behind the first item that fails.
        narrowed: see `GateResult`.
        on_item: called behind each item.

    Raises:
        NoStepError: there is no such step, or what it declares is not understood.
    """
    seed, worlds = items[0].seed, [str(size) for size in dict.fromkeys(item.ranks for item in items)]
    nobody, device = Candidate(step.name, _elsewhere), describe_device(torch.device(device_type))
    suite = f"steps on {', '.join(worlds)} ranks"
    result = GateResult(nobody, ACCUMULATIONS["undeclared"], device, suite, seed, strict, narrowed=narrowed, why=why())
    words = ["--step", step.name, "--world", ",".join(worlds), "--device", device_type, "--seed", str(seed)]
    result.command = shlex.join(["mxref", "gate", "--distributed", *words])
    start = time.monotonic()
    for size, own in groupby(items, key=lambda item: item.ranks):
        with World(size, device_type, limits) as world:
            declared = describe(world, step.make)
            result.declares = (("loss", declared.loss), ("sums over ranks", str(declared.reduction)))
            result.declares += (("slots of a token", declared.outputs),)
            result.declares += (("checkpoint", "read back" if declared.saves else "none (no mxref_load)"),)
            result.narrowed = ", ".join(filter(None, [*declared.covers, narrowed]))
            for item in own:
                found = judge(world, step.make, declared, item.case, seed)
                result.findings += [replace(finding, id=item.id) for finding in found]
                on_item(f"{item.case.name}, {size} ranks")
                if fail_fast and not all(finding.ok for finding in found):
                    break
        if fail_fast and not all(finding.ok for finding in result.findings):
            break
    result.seconds = time.monotonic() - start
    return result


def _elsewhere(**operands: Any) -> Any:
    raise RuntimeError("the step stays in its ranks' processes")
