"""Memory: what a run must leave as it was, and where it may not read."""

from __future__ import annotations

from collections.abc import Sequence

from mxref.verification.candidates.answer import Answer
from mxref.verification.checks.elements import name_of, raised
from mxref.verification.checks.expectation import Expectation
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.checks.values import decoded_bits, equal

__all__ = ["inside_tensors", "right_and_unwritten", "unwritten", "wide_indices"]


def unwritten(answers: Sequence[Answer], expected: Expectation) -> list[Finding]:
    """Every watched operand, and what lies around it, holds what it held before.

    A run that ended in an error says nothing in a candidate's favour, but what it overwrote counts.
    """
    return [
        Finding(
            "",
            name_of(answer, expected.sample),
            written.place,
            Status.FAIL if written.inside or written.outside else Status.PASS,
            f"{written.inside} bytes of it and {written.outside} bytes around {written.note or 'it'} were overwritten"
            if written.inside or written.outside
            else "left as it was, and its surroundings too",
            written.elements,
            written.inside + written.outside,
        )
        for answer in answers
        for written in answer.written
        if answer.error is None or written.inside or written.outside
    ]


def right_and_unwritten(answers: Sequence[Answer], expected: Expectation) -> list[Finding]:
    """Every answer equals the contract's result (a decoder's the decoded weights), and nothing else was written."""
    decoded = [answer for answer in answers if "W" in answer.outputs]
    others = [answer for answer in answers if "W" not in answer.outputs]
    return [*equal(others, expected), *decoded_bits(decoded, expected), *unwritten(answers, expected)]


def inside_tensors(answers: Sequence[Answer], expected: Expectation) -> list[Finding]:
    """Every load and store of an interpreted run lay inside the tensors of its launch."""
    findings = []
    for answer in answers:
        case = name_of(answer, expected.sample)
        if answer.error is not None:
            findings.append(raised(answer, case))
            continue
        touched = answer.outputs["addresses"]
        count = 0 if touched is None else int(touched)
        reason = f"{count:,} addresses, all inside their launch's tensors"
        findings.append(Finding("", case, "all", Status.PASS, reason, count, 0))
    return findings


def wide_indices(answers: Sequence[Answer], expected: Expectation) -> list[Finding]:
    """Products of two sizes are 64 bits wide in an interpreted run."""
    return [
        raised(answer, name_of(answer, expected.sample))
        if answer.error is not None
        else Finding(
            "",
            name_of(answer, expected.sample),
            "all",
            Status.PASS,
            "products of two sizes are 64 bits wide",
            0,
            0,
        )
        for answer in answers
    ]
