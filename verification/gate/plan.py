"""What the gate asks: one item a case and way of asking."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from hashlib import sha256
from itertools import groupby
from typing import Any

import torch

from mxref.checkpoints import Checkpoint, ExpertTensor, open_checkpoint, read_expert_weights
from mxref.verification.cases import suites
from mxref.verification.cases.case import Case, Sample
from mxref.verification.cases.draw import draw, draw_for_weights
from mxref.verification.cases.scope import Scope
from mxref.verification.cases.small import usual_dtype
from mxref.verification.cases.subset import Subset
from mxref.verification.checks.check import Cases, Check, OwnCase
from mxref.verification.checks.expectation import slopes_of
from mxref.verification.checks.finding import Finding
from mxref.verification.checks.registry import (
    CHECKS,
    DECODE,
    DRIFT,
    INTEGER,
    INTERVAL,
    POISON,
    SECOND_BACKWARD,
)
from mxref.verification.gate.problem import problem_of, weights_of
from mxref.verification.gate.projections import Projections
from mxref.weights import MXLayout


@dataclass(frozen=True)
class Item:
    """One case for the checks that share its runs.

    Attributes:
        checks: with the same `ask`.
        draw: makes the sample.
        seed: of the sample.
    """

    checks: tuple[Check, ...]
    case: Case | OwnCase
    draw: Callable[[], Any]
    seed: int = 0

    @property
    def name(self) -> str:
        """The case's."""
        return self.case.name

    def fits(self, patterns: Sequence[str]) -> bool:
        """Whether the case's name, or a check's, `matches`."""
        return any(matches(name, patterns) for name in (self.name, *(check.name for check in self.checks)))

    @cached_property
    def id(self) -> str:
        """Eight digits of what is asked with which seed, the same in every run."""
        return sha256(f"{self.checks[0].name} {self.case} {self.seed}".encode()).hexdigest()[:8]

    def named(self, finding: Finding) -> Finding:
        """The finding with the item's identifier and, if it failed, its problem."""
        if finding.ok:
            return replace(finding, id=self.id)
        sample = self.sample
        if not isinstance(sample, Sample):
            return replace(finding, id=self.id)
        problem, weights = problem_of(sample.case, self.seed), weights_of(sample, finding)
        return replace(finding, id=self.id, problem=problem, weights=weights)

    @cached_property
    def sample(self) -> Any:
        """The sample, drawn once."""
        return self.draw()

    @property
    def slopes(self) -> int:
        """The most slopes fitted for drift."""
        fitted = any(check.name == DRIFT.name for check in self.checks)
        return slopes_of(self.case) if fitted and isinstance(self.case, Case) else 0


def plan(scope: Scope, own: bool, checks: Sequence[Check] = CHECKS) -> list[Item]:
    """All that a candidate is asked within a scope, in the checks' order; `own`: this project's kernels."""
    device = torch.device(scope.device_type)
    asked = [check for check in checks if check.is_for(own, device) and _within(scope.subset, check)]
    items = []
    for _, alike in groupby(asked, key=lambda check: (id(check.ask), id(check.cases))):
        together = tuple(alike)
        for case in together[0].cases(scope):
            if isinstance(case, Case):
                if not own and case.layout != MXLayout.FWD:
                    continue  # this project's own layouts
                if not scope.subset.holds(case):
                    continue
                case = scope.subset.of(case)
            items.append(Item(together, case, drawing(case, device, scope.seed), scope.seed))
    return items


def _within(subset: Subset, check: Check) -> bool:
    """Whether a check asks for something that the subset has."""
    return check.name != SECOND_BACKWARD.name or not (subset.forward or subset.one_backward)


def plan_cases(
    cases: Iterable[Case], device: torch.device, seed: int, values: Sequence[Check] = (INTERVAL,)
) -> list[Item]:
    """Given cases: exact sums by equality, others by the checks of `values`."""
    checks = {True: (INTEGER,), False: tuple(values)}
    return [Item(checks[case.exact], case, drawing(case, device, seed), seed) for case in cases]


def plan_problem(sizes: tuple[int, int, int, int, int, int], dtype: torch.dtype, scope: Scope) -> list[Item]:
    """One problem of the user's by every general check that fits it: exact, and with ordinary numbers.

    Args:
        sizes: E, K, N, M, k, r; r 0 for no LoRA.
        dtype: activation dtype.
        scope: what lies outside its subset is left out.
    """
    E, K, N, M, k, r = sizes
    plain = Case("plain", E, K, N, M, k, r, dtype, data="balanced")
    gated = replace(plain, name="biases and gates", bias=True, gate_slots=k)
    drawn = [plain, replace(gated, use_fused_dX=True, use_fused_gather=True)]
    sentinels = replace(gated, name="sentinels", routing="sentinels", parameter_dtype=torch.float32)
    exact = [replace(case, name=f"integer, {case.name}", data="integer") for case in (*drawn, sentinels)]
    instead: dict[Cases, Cases] = {
        suites.exact_cases: lambda scope: exact,
        suites.ordinary_cases: lambda scope: drawn,
        POISON.cases: lambda scope: drawn[:1],
    }
    checks = [replace(check, cases=instead[check.cases]) for check in CHECKS if check.cases in instead]
    return plan(scope, own=False, checks=checks)


def plan_checkpoint(projections: Projections, scope: Scope) -> list[Item]:
    """The decode in full, then a checkpoint's expert weights under random activations and adapters, by intervals."""
    checkpoint = open_checkpoint(projections.path)
    items = plan(replace(scope, suite="quick"), own=False, checks=[DECODE])
    for tensor in projections.tensors:
        count = min(projections.experts or tensor.E, tensor.E)
        name = f"{tensor.name}, experts 0–{count - 1} of {tensor.E}"
        items.append(Item((INTERVAL,), Case(name), _reading(checkpoint, tensor, count, name, scope), scope.seed))
    return items


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name fits one of the patterns: a glob over the whole name; without wildcards, a part of it.

    No patterns fit every name. Case is ignored.
    """
    wild = [pattern if re.search(r"[*?\[]", pattern) else f"*{pattern}*" for pattern in patterns]
    return not wild or any(fnmatch(name.lower(), pattern.lower()) for pattern in wild)


def slopes_in(items: Sequence[Item]) -> int:
    """Slopes of a whole run, which share its probability of a false alarm."""
    return sum(item.slopes for item in items)


def drawing(case: Case | OwnCase, device: torch.device, seed: int) -> Callable[[], Any]:
    """What draws a case on a device."""
    return lambda: draw(case, device, seed) if isinstance(case, Case) else case.sample(device, seed)


def _reading(checkpoint: Checkpoint, tensor: ExpertTensor, count: int, name: str, scope: Scope) -> Callable[[], Sample]:
    def read() -> Sample:
        _, weights = next(iter(read_expert_weights(checkpoint, [tensor.name])))
        weights = weights.select(torch.arange(count)).to(scope.device_type)
        slots = min(4, count)
        down = tensor.name.endswith("down_proj")
        options = {"grouped_in": True, "gate_slots": slots} if down else {"grouped_out": True}
        dtype = usual_dtype(scope.device_type)
        sample = draw_for_weights(weights, name, top_k=slots, dtype=dtype, seed=scope.seed, bias=True, **options)
        return replace(sample, case=scope.subset.of(sample.case))

    return read
