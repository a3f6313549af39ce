"""Runs a plan and adds the findings up to one verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mxref.verification.arithmetic.accumulation import ACCUMULATIONS, Accumulation, default_accumulation
from mxref.verification.candidates.answer import Answer
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.global_state import GlobalState
from mxref.verification.candidates.own_code import OwnCode
from mxref.verification.cases.case import Case, Sample
from mxref.verification.checks.check import Check
from mxref.verification.checks.expectation import Expectation
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.checks.registry import INTERVAL, STATE
from mxref.verification.gate.plan import Item, slopes_in
from mxref.verification.gate.result import GateResult, describe_device

_SECOND_CHANCE = (
    "outside the bound of this device's default accumulation, inside the order-free one; declare the accumulation for "
    "a full verdict"
)
_SMALL = 2**24
"""Multiplications of a forward pass, up to which the reference is computed on the CPU: it is made of hundreds of
operations, each of which waits its turn on a GPU that several processes share."""


def run_gate(
    candidate: Candidate, items: Sequence[Item], device: torch.device, *, suite: str, seed: int, strict: bool = False
) -> GateResult:
    """Judge one candidate.

    Args:
        candidate: what to judge.
        items: from `plan`.
        device: the device that they were made for.
        suite: what to call them in the report.
        seed: that they were made with.
        strict: see `GateResult.exit_code`.
    """
    how = candidate.accumulation or default_accumulation(device)
    result = GateResult(candidate, how, describe_device(device), suite, seed, strict)
    start, slopes, code = time.monotonic(), slopes_in(items), OwnCode.now()
    for item in items:
        result.findings += judge(item, candidate, how, slopes, code=code)
    result.seconds = time.monotonic() - start
    return result


def judge(
    item: Item,
    candidate: Candidate,
    how: Accumulation,
    slopes: int | None = None,
    answered: Callable[[], None] = lambda: None,
    code: OwnCode | None = None,
    shared_memory: bool = False,
) -> list[Finding]:
    """What the checks of one item find: the candidate is run once for all of them.

    A candidate that declares no accumulation gets a second chance against the order-free bound.

    Args:
        item: of a plan.
        candidate: what to judge.
        how: the accumulation that bounds are derived for.
        slopes: that are fitted in the whole run; None for this item's alone.
        answered: called when the candidate has done its part. The reference is computed only then, so that no memory
            the candidate gets has held it.
        code: the code that judges, as it was before the candidate was loaded; None for as it is now, with whatever the
            caller has replaced in it.
        shared_memory: other processes use the same GPU.

    Raises:
        torch.OutOfMemoryError: it had too little memory for the reference or, with `shared_memory`, for the candidate,
            whose failure that is otherwise.
    """
    sample, checks, before, code = item.sample, item.checks, GlobalState.now(), code or OwnCode.now()
    question = _question(item)
    answers = checks[0].ask(candidate, sample)
    changes = [*GlobalState.now().changes(before).values(), *code.restore()]
    before.restore()
    if _question(item) != question:
        changes.append("the question was changed, of which the candidate gets copies")
    for answer in answers:
        if shared_memory and isinstance(answer.error, torch.OutOfMemoryError):
            raise answer.error
    answered()
    asked_on = sample.problem.device if isinstance(sample, Sample) else None
    if isinstance(sample, Sample) and _is_for_cpu(sample, answers):
        sample, answers = sample.to("cpu"), [_on_cpu(answer) for answer in answers]
    expectation = partial(_expectation, sample, candidate, slopes=slopes, asked_on=asked_on)
    findings = _compare(checks, answers, expectation(how))
    by_interval = any(check.name == INTERVAL.name for check in checks)
    if by_interval and candidate.accumulation is None and not all(finding.ok for finding in findings):
        order_free = expectation(ACCUMULATIONS["undeclared"])
        findings = _weaker(findings, _compare(checks, answers, order_free))
    if changes:
        reason = f"left changed what is not its own: {'; '.join(changes)}"
        findings.append(Finding(STATE.name, item.name, "all", Status.FAIL, reason, 0, 0))
    return [item.named(finding) for finding in findings]


def _question(item: Item) -> tuple[object, ...]:
    """What an item asks, to be compared with what it has become."""
    sample = item.sample
    return item.id, sample.checksum() if isinstance(sample, Sample) else None


def _expectation(
    sample: object, candidate: Candidate, how: Accumulation, slopes: int | None, asked_on: torch.device | None = None
) -> Expectation | object:
    """What the sample's answers are held against; other samples bring what they need."""
    if not isinstance(sample, Sample):
        return sample
    return Expectation(sample, candidate.points(sample.problem.dtype), how, slopes, asked_on=asked_on)


def _is_for_cpu(sample: Sample, answers: Sequence[Answer]) -> bool:
    """Whether a GPU's results are compared on the CPU: of small cases, if each is where it should be."""
    case, here = sample.case, sample.problem.device
    if here.type == "cpu" or _work(case) > _SMALL:
        return False
    results = [x for answer in answers for x in answer.outputs.values() if x is not None]
    return all(isinstance(x, Tensor) and x.device == here for x in results)


def _work(case: Case) -> int:
    """Multiplications of every row, and of every expert's weights as if it had one more, by its base and LoRA's two.

    What is done with each element of the rows takes about as long as 16 of them.
    """
    ends = case.K + case.N
    return (case.rows + case.experts) * (case.K * case.N + case.rank * ends) + 16 * case.rows * ends


def _on_cpu(answer: Answer) -> Answer:
    outputs = {name: None if x is None else x.cpu() for name, x in answer.outputs.items()}
    return replace(answer, outputs=outputs, rows={name: rows.cpu() for name, rows in answer.rows.items()})


def _compare(checks: Sequence[Check], answers: Sequence[Answer], expected: object) -> list[Finding]:
    return [replace(finding, check=check.name) for check in checks for finding in check.compare(answers, expected)]


def _weaker(findings: Sequence[Finding], again: Sequence[Finding]) -> list[Finding]:
    """What failed, but holds against the order-free bound, becomes a weak pass."""
    second = {(finding.check, finding.tensor): finding for finding in again if finding.ok}
    return [
        replace(second[f.check, f.tensor], status=Status.WEAK, reason=_SECOND_CHANCE)
        if f.status is Status.FAIL and (f.check, f.tensor) in second
        else f
        for f in findings
    ]
