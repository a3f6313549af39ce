"""One run of the gate on a step: every case in every world, and a verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from mxref.verification.arithmetic.accumulation import ACCUMULATIONS
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.loading import find
from mxref.verification.candidates.processes import Limits
from mxref.verification.distributed.cases import StepCase
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
    cases: Sequence[StepCase],
    worlds: Sequence[int],
    device_type: str,
    *,
    seed: int,
    strict: bool = False,
    limits: Limits = LIMITS,
    fail_fast: bool = False,
    narrowed: str = "",
    on_case: Callable[[str], None] = lambda name: None,
) -> GateResult:
    """Judge one step.

    Args:
        step: what to judge.
        cases: what it is asked.
        worlds: numbers of ranks; each asks every case.
        device_type: "cpu" (gloo) or "cuda" (NCCL, a GPU a rank).
        seed: of every draw.
        strict: see `GateResult.exit_code`.
        limits: see `distributed.world`.
        fail_fast: stop behind the first case that fails.
        narrowed: see `GateResult`.
        on_case: called behind each case.

    Raises:
        NoStepError: there is no such step, or what it declares is not understood.
    """
    nobody, sizes = Candidate(step.name, _elsewhere), ", ".join(map(str, worlds))
    device, suite = describe_device(torch.device(device_type)), f"steps on {sizes} ranks"
    result = GateResult(nobody, ACCUMULATIONS["undeclared"], device, suite, seed, strict, narrowed=narrowed, why=why())
    start = time.monotonic()
    for size in worlds:
        with World(size, device_type, limits) as world:
            declared = describe(world, step.make)
            result.declares = (("loss", declared.loss), ("sums over ranks", str(declared.reduction)))
            result.declares += (("checkpoint", "read back" if declared.saves else "none (no mxref_load)"),)
            result.narrowed = ", ".join(filter(None, [*declared.covers, narrowed]))
            for case in cases:
                result.findings += judge(world, step.make, declared, case, seed)
                on_case(f"{case.name}, {size} ranks")
                if fail_fast and not all(finding.ok for finding in result.findings):
                    break
    result.seconds = time.monotonic() - start
    return result


def _elsewhere(**operands: Any) -> Any:
    raise RuntimeError("the step stays in its ranks' processes")
