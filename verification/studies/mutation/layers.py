"""The gate's checks on small cases, as the process of a mutant asks them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from mxref.verification.candidates.candidate import Candidate
from mxref.verification.cases.scope import Scope
from mxref.verification.checks.finding import Finding
from mxref.verification.gate.plan import Item, plan
from mxref.verification.gate.run import judge

__all__ = ["Layer", "Trial", "layers"]


@dataclass(frozen=True)
class Trial:
    """One item of a plan."""

    name: str
    judge: Callable[[Candidate], list[Finding]]


@dataclass(frozen=True)
class Layer:
    """One check and its cases; `slow`: several runs a trial, asked last."""

    name: str
    trials: tuple[Trial, ...]
    slow: bool = False


def layers(device: torch.device, seed: int = 0) -> list[Layer]:
    """Every check that judges mutants on `device`, in the gate's order."""
    by_check: dict[str, list[Trial]] = {}
    for item in plan(Scope("small", device.type, seed), own=True):
        by_check.setdefault(item.checks[0].name, []).append(Trial(item.name, partial(_judge, item)))
    return [Layer(name, tuple(trials)) for name, trials in by_check.items()]


def _judge(item: Item, candidate: Candidate) -> list[Finding]:
    assert candidate.accumulation is not None
    return judge(item, candidate, candidate.accumulation)
