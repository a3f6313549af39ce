"""Runs a plan and adds the findings up to one verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from mxref.verification.arithmetic.accumulation import ACCUMULATIONS, Accumulation, default_accumulation
from mxref.verification.candidates.answer import Answer
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.global_state import GlobalState
from mxref.verification.candidates.own_code import OwnCode
from mxref.verification.cases.case import Sample
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
    findings = _compare(checks, answers, _expectation(sample, candidate, how, slopes))
    by_interval = any(check.name == INTERVAL.name for check in checks)
    if by_interval and candidate.accumulation is None and not all(finding.ok for finding in findings):
        order_free = _expectation(sample, candidate, ACCUMULATIONS["undeclared"], slopes)
        findings = _weaker(findings, _compare(checks, answers, order_free))
    if changes:
        reason = f"left changed what is not its own: {'; '.join(changes)}"
        findings.append(Finding(STATE.name, item.name, "all", Status.FAIL, reason, 0, 0))
    return [item.named(finding) for finding in findings]


def _question(item: Item) -> tuple[object, ...]:
    """What an item asks, to be compared with what it has become."""
    sample = item.sample
    return item.id, sample.checksum() if isinstance(sample, Sample) else None


def _expectation(sample: object, candidate: Candidate, how: Accumulation, slopes: int | None) -> Expectation | object:
    """What the sample's answers are held against; other samples bring what they need."""
    if not isinstance(sample, Sample):
        return sample
    return Expectation(sample, candidate.points(sample.problem.dtype), how, slopes)


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
