"""Runs a plan to a verdict."""

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
        device: of the items.
        suite: their name in the report.
        seed: of the items.
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
    """What the checks of one item find, from one run of the candidate.

    A candidate that declares no accumulation gets a second chance against the order-free bound.

    Args:
        item: of a plan.
        candidate: what to judge.
        how: the accumulation that bounds are derived for.
        slopes: fitted in the whole run; None for this item's alone.
        answered: called when the candidate has answered. The reference is computed afterwards, so that no memory the
            candidate gets has held it.
        code: the judging code as before the candidate was loaded; None for as it is now.
        shared_memory: of the GPU, with other processes.

    Raises:
        torch.OutOfMemoryError: for the reference or, with `shared_memory`, for the candidate, which otherwise fails by
            it.
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
    """What an item asks, to detect changes."""
    sample = item.sample
    return item.id, sample.checksum() if isinstance(sample, Sample) else None


def _expectation(
    sample: object, candidate: Candidate, how: Accumulation, slopes: int | None, asked_on: torch.device | None = None
) -> Expectation | object:
    """What the sample's answers are held against; own cases' samples themselves."""
    if not isinstance(sample, Sample):
        return sample
    return Expectation(sample, candidate.points(sample.problem.dtype), how, slopes, asked_on=asked_on)


def _is_for_cpu(sample: Sample, answers: Sequence[Answer]) -> bool:
    """Whether a GPU's results are compared on the CPU: those of small cases on the right device."""
    case, here = sample.case, sample.problem.device
    if here.type == "cpu" or _work(case) > _SMALL:
        return False
    results = [x for answer in answers for x in answer.outputs.values() if x is not None]
    return all(isinstance(x, Tensor) and x.device == here for x in results)


def _work(case: Case) -> int:
    """Multiplications by base and LoRA weights of each row and one more an expert; elements of rows count 16."""
    ends = case.K + case.N
    return (case.rows + case.experts) * (case.K * case.N + case.rank * ends) + 16 * case.rows * ends


def _on_cpu(answer: Answer) -> Answer:
    outputs = {name: None if x is None else x.cpu() for name, x in answer.outputs.items()}
    return replace(answer, outputs=outputs, rows={name: rows.cpu() for name, rows in answer.rows.items()})


def _compare(checks: Sequence[Check], answers: Sequence[Answer], expected: object) -> list[Finding]:
    return [replace(finding, check=check.name) for check in checks for finding in check.compare(answers, expected)]


def _weaker(findings: Sequence[Finding], again: Sequence[Finding]) -> list[Finding]:
    """Failures that hold against the order-free bound become weak passes."""
    second = {(finding.check, finding.tensor): finding for finding in again if finding.ok}
    return [
        replace(second[f.check, f.tensor], status=Status.WEAK, reason=_SECOND_CHANCE)
        if f.status is Status.FAIL and (f.check, f.tensor) in second
        else f
        for f in findings
    ]
