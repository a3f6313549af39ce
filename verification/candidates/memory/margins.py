"""Memory that shows what a kernel must not touch: fresh tensors full of NaN, between margins that nobody may cross.

A load whose mask was lost reads a margin and spreads NaN, a store whose mask was lost damages one, and an element that
nothing wrote stays NaN. Unlike `poison_guard`, which surrounds the operands, this surrounds what the candidate itself
allocates: outputs, intermediate results, tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.scattermoe import RoundingPoints
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.memory.allocations import Allocations
from mxref.verification.candidates.memory.red_zones import bytes_of, fenced
from mxref.verification.cases.case import Sample
from mxref.verification.checks.exact import integer_guard, reference
from mxref.verification.checks.finding import Finding, Status

__all__ = ["Margins", "foreign_rows_guard", "margins_guard", "wild_offsets_guard", "wild_positions_guard"]

_WIDTH = 1 << 14
"""Elements on either side: more than one tile's rows of any case here."""


class Margins(Allocations):
    """While active, what Python code allocates or clones gets margins."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []

    def place(self, fresh: Tensor) -> Tensor:
        """Garbage, between margins."""
        size = fresh.numel()
        self._buffers.append(buffer := _garbage(size + 2 * _WIDTH, fresh))
        return buffer[_WIDTH : _WIDTH + size].view(fresh.shape)

    def damage(self) -> str:
        """What was written outside, in words; "" for nothing."""
        for buffer in self._buffers:
            outside = torch.cat([buffer[:_WIDTH], buffer[-_WIDTH:]])
            intact = bytes_of(outside) == bytes_of(_garbage(outside.numel(), outside))
            if not intact.all():
                size, count = buffer.numel() - 2 * _WIDTH, int((~intact.all(1)).sum())
                return f"{count} elements written outside a {buffer.dtype} tensor of {size}"
        return ""


def margins_guard(candidate: Candidate, sample: Sample) -> list[Finding]:
    """An integer fixture comes out right in memory with margins, and these stay as they were."""
    with Margins() as margins:
        findings = integer_guard(candidate, fenced(sample)[0])
    return [*(replace(finding, guard="margins") for finding in findings), _intact(margins, sample.case.name)]


def wild_positions_guard(candidate: Candidate, sample: Sample) -> list[Finding]:
    """Positions out of range that nobody checked, as on a GPU: nothing faults, and all other rows stay right.

    Args:
        candidate: what to judge.
        sample: an integer fixture, ungrouped and without gates, of at least six routed rows.
    """
    problem = sample.problem
    positions = problem.sorted_scattered_idxs.clone()
    kept = torch.ones(problem.P, dtype=torch.bool, device=problem.device)
    for row, position in {0: -1, 1: -3, 3: problem.P, 4: problem.P + 5, 5: 2**40}.items():
        kept[positions[row]] = False
        positions[row] = position
    expected = reference(sample, RoundingPoints.contract(problem.dtype))["Y"][kept]
    inside, _ = fenced(replace(sample, problem=replace(problem, sorted_scattered_idxs=positions)))
    with _unchecked(), Margins() as margins:
        Y = candidate.run(inside)["Y"]
    assert Y is not None
    wrong = int((Y[kept].double() != expected).sum())
    status, reason = (Status.FAIL if wrong else Status.PASS), f"{wrong} elements of rows with good positions differ"
    name = "wild positions"
    return [Finding("margins", name, "Y", status, reason, expected.numel(), wrong), _intact(margins, name)]


def wild_offsets_guard(candidate: Candidate, sample: Sample) -> list[Finding]:
    """Offsets outside 0..P that nobody checked are read as if they were forced into it, and nothing faults.

    Args:
        candidate: what to judge.
        sample: an integer fixture whose first and last experts have no rows, without sentinels.
    """
    problem, findings = sample.problem, []
    for name, below, above in (("near", -3, problem.P + 5), ("far", 5 - 2**40, 2**40)):
        offsets = problem.expert_offsets.clone()
        offsets[offsets == 0] = below
        offsets[offsets == problem.P] = above
        inside, _ = fenced(replace(sample, problem=replace(problem, expert_offsets=offsets)))
        with _unchecked(), Margins() as margins:
            outputs = candidate.run(inside)
        name = f"wild offsets, {name}"
        findings += _equal(name, outputs, sample, "elements follow offsets out of range")
        findings.append(_intact(margins, name))
    return findings


def foreign_rows_guard(candidate: Candidate, sample: Sample) -> list[Finding]:
    """What belongs to another rank holds NaN, and none of it spreads: every result is that of the clean sample.

    Args:
        candidate: what to judge.
        sample: an integer fixture with sentinels and gates, one slot a token, not grouped.
    """
    problem = sample.problem
    foreign = problem.sorted_scattered_idxs[problem.sorted_expert_idxs >= problem.E]
    gates, inputs, grad_out = (x.clone() for x in (_given(problem.gates), problem.inputs, sample.grad_out))
    for x in (gates, inputs, grad_out):
        x[foreign] = float("nan")
    outputs = candidate.run(replace(sample, problem=replace(problem, gates=gates, inputs=inputs), grad_out=grad_out))
    return _equal("foreign rows", outputs, sample, "elements follow another rank's rows")


def _unchecked() -> Any:
    """Within this context values inside index tensors are not checked, as on a GPU."""
    return patch.object(Problem, "validate", lambda self, check_values: None)


def _equal(name: str, outputs: Mapping[str, Tensor | None], sample: Sample, broken: str) -> list[Finding]:
    """Whether every output is the reference's for the sample."""
    findings = []
    for tensor, expected in reference(sample, RoundingPoints.contract(sample.problem.dtype)).items():
        wrong = int((_given(outputs[tensor]).double() != expected).sum())
        status, reason = (Status.FAIL if wrong else Status.PASS), f"{wrong} {broken}"
        findings.append(Finding("margins", name, tensor, status, reason, expected.numel(), wrong))
    return findings


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _intact(margins: Margins, case: str) -> Finding:
    damage = margins.damage()
    if damage:
        return Finding("margins", case, "memory", Status.FAIL, damage, 0, 1)
    return Finding("margins", case, "memory", Status.PASS, "nothing written outside a tensor", 0, 0)


def _garbage(size: int, like: Tensor) -> Tensor:
    """Elements that no computation should ever meet: the largest integers, and a NaN that none results in."""
    if like.is_floating_point():
        return torch.full((size * like.element_size(),), 0xFF, dtype=torch.uint8, device=like.device).view(like.dtype)
    largest = True if like.dtype == torch.bool else torch.iinfo(like.dtype).max
    return torch.full((size,), largest, dtype=like.dtype, device=like.device)
