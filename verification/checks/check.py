"""A check: name and reason, who is asked what, and how answers are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch

from mxref.verification.candidates.answer import Answer
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.cases.case import Case
from mxref.verification.cases.scope import Scope, Suite
from mxref.verification.checks.finding import Finding


class Asked(StrEnum):
    """Who is asked."""

    ANY = "any candidate"
    OWN = "this project's kernels"
    INTERPRETED = "this project's kernels, interpreted"
    OWN_ON_GPU = "this project's kernels, on a GPU"


class OwnCase(Protocol):
    """A case of another kind, for this project's kernels alone; its check knows its sample."""

    @property
    def name(self) -> str:
        """In words."""

    def sample(self, device: torch.device, seed: int) -> Any:
        """The operands."""


Cases = Callable[[Scope], Sequence[Case | OwnCase]]


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: unique.
        why: what it sees that others do not, for a new reader.
        ask: how a candidate is run; checks with the same `ask` and `cases` share the run.
        compare: answers and an expectation (of an OwnCase the sample) -> findings, without the check's name.
    """

    name: str
    why: str
    asked: Asked
    cases: Cases = lambda scope: []
    ask: Callable[[Candidate, Any], list[Answer]] = lambda candidate, sample: []
    compare: Callable[[Sequence[Answer], Any], list[Finding]] = lambda answers, expected: []

    def is_for(self, own: bool, device: torch.device) -> bool:
        """Whether a candidate is asked on a device; `own`: this project's kernels."""
        return {
            Asked.ANY: True,
            Asked.OWN: own,
            Asked.INTERPRETED: own and device.type == "cpu",
            Asked.OWN_ON_GPU: own and device.type == "cuda",
        }[self.asked]


def named(cases: Callable[[Suite, str], list[Case]]) -> Cases:
    """The named cases of a suite."""
    return lambda scope: cases(scope.suite, scope.device_type)
