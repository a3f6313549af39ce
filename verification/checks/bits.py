"""Bits: answers that must be alike to the last one, whatever they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from mxref.verification.arithmetic.tensor_bytes import bytes_of
from mxref.verification.candidates.answer import Answer, Outputs
from mxref.verification.cases.case import Sample
from mxref.verification.checks.elements import axes_of, name_of, raised
from mxref.verification.checks.expectation import Expectation
from mxref.verification.checks.finding import Counterexample, Finding, Status
from mxref.verification.checks.patterns import Axis, patterns
from mxref.verification.checks.values import equal, inside_intervals


def same_bits(answers: Sequence[Answer], expected: Expectation) -> list[Finding]:
    """Every answer that is to be like another has its bits: one finding a case and tensor."""
    findings: dict[tuple[str, str], Finding] = {}
    for answer in answers:
        case = name_of(answer, expected.sample)
        if answer.error is not None:
            findings.setdefault((case, "all"), raised(answer, case))
            continue
        first = None if answer.like is None else answers[answer.like]
        if first is None or first.error is not None:
            continue
        for finding in _compare(case, first.outputs, answer.outputs, answer.circumstance, expected.sample):
            earlier = findings.get((case, finding.tensor))
            if earlier is None or earlier.ok:
                findings[case, finding.tensor] = finding
    return list(findings.values())


def same_values(answers: Sequence[Answer], expected: Expectation) -> list[Finding]:
    """The same with −0 equal to 0, against the golden model's answers."""
    positive = [
        replace(answer, outputs={name: None if x is None else x + 0.0 for name, x in answer.outputs.items()})
        for answer in answers
    ]
    return same_bits(positive, expected)


def a_configuration(answers: Sequence[Answer], expected: Expectation) -> list[Finding]:
    """Every pinned configuration computes the sample right, and dispatch gives the bits of one of them."""
    if not answers:
        return []
    chosen, *pinned = answers
    if chosen.error is not None:
        return [raised(chosen, name_of(chosen, expected.sample))]
    judge = equal if expected.sample.case.exact else inside_intervals
    findings = judge(pinned, expected)
    matches = [each for each in pinned if each.error is None and _same(chosen.outputs, each.outputs)]
    status, reason = Status.PASS, "dispatch gives the bits of a reachable configuration"
    if not matches:
        status, reason = Status.FAIL, "dispatch gives the bits of no reachable configuration: it picked another one"
    return [*findings, Finding("", expected.sample.case.name, "dispatch", status, reason, 0, 0)]


def _compare(
    case: str, expected: Outputs, got: Outputs, circumstance: str, sample: Sample | None = None
) -> list[Finding]:
    findings = []
    for tensor, x in expected.items():
        again = got.get(tensor)
        if x is None or again is None or x.shape != again.shape or x.dtype != again.dtype:
            same = x is None and again is None
            reason = "no gradient, alike" if same else f"other bits {circumstance}: no such tensor, or of another form"
            findings.append(Finding("", case, tensor, Status.PASS if same else Status.FAIL, reason, 0, 0))
            continue
        different = (bytes_of(x) != bytes_of(again)).any(-1)
        count = int(different.sum())
        if not count:
            reason = f"the same bits {circumstance}"
            findings.append(Finding("", case, tensor, Status.PASS, reason, x.numel(), 0))
            continue
        where = tuple(int(index) for index in different.nonzero()[0])
        value, other = float(x[where].double()), float(again[where].double())
        fresh = int((again.double().isnan() & ~x.double().isnan()).sum())
        axes = [] if sample is None else axes_of(sample, tensor)
        found = _common(different, again, x, axes)
        reason = f"other bits {circumstance}: {''.join(f'{each}; ' for each in found)}{count} of {x.numel()} elements"
        reason += f", {fresh} of them NaN" if fresh else ""
        shown = Counterexample(where, other, value, value, value)
        findings.append(
            Finding("", case, tensor, Status.FAIL, reason, x.numel(), count, counterexample=shown, patterns=found)
        )
    return findings


def _common(different: Tensor, got: Tensor, expected: Tensor, axes: Sequence[Axis]) -> tuple[str, ...]:
    """What differing elements have in common, if their axes are known and whole."""
    whole = len(axes) == different.ndim and all(
        group.numel() == size for axis, size in zip(axes, different.shape, strict=True) for _, group in axis.groups
    )
    return tuple(patterns(different, got.double(), expected.double(), axes)) if whole else ()


def _same(a: Outputs, b: Outputs) -> bool:
    return all(finding.ok for finding in _compare("", a, b, ""))
