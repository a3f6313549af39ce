"""Memory: what a run may not write or read."""

from __future__ import annotations

from collections.abc import Sequence

from mxref.verification.candidates.answer import Answer
from mxref.verification.checks.elements import each_answer, name_of
from mxref.verification.checks.expectation import Expectation
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.checks.values import decoded_bits, equal


def unwritten(answers: Sequence[Answer], expected: Expectation) -> list[Finding]:
    """Every watched operand, and its surroundings, are unchanged.

    What a run that ended in an error overwrote counts too.
    """
    findings = []
    for answer in answers:
        for written in answer.written:
            count, case = written.inside + written.outside, name_of(answer, expected.sample)
            status, reason = Status.PASS, "left as it was, and its surroundings too"
            if count:
                around = f"{written.outside} bytes around {written.note or 'it'}"
                status, reason = Status.FAIL, f"{written.inside} bytes of it and {around} were overwritten"
            if count or answer.error is None:
                findings.append(Finding("", case, written.place, status, reason, written.elements, count))
    return findings


def right_and_unwritten(answers: Sequence[Answer], expected: Expectation) -> list[Finding]:
    """Every answer equals the contract's result (a decoder's: decoded weights), and nothing else was written."""
    decoded = [answer for answer in answers if "W" in answer.outputs]
    others = [answer for answer in answers if "W" not in answer.outputs]
    return [*equal(others, expected), *decoded_bits(decoded, expected), *unwritten(answers, expected)]


def inside_tensors(answers: Sequence[Answer], expected: Expectation) -> list[Finding]:
    """Every load and store of an interpreted run lay inside the tensors of its launch."""

    def judge(answer: Answer, case: str) -> list[Finding]:
        touched = answer.outputs["addresses"]
        count = 0 if touched is None else int(touched)
        reason = f"{count:,} addresses, all inside their launch's tensors"
        return [Finding("", case, "all", Status.PASS, reason, count, 0)]

    return each_answer(answers, expected.sample, judge)


def wide_indices(answers: Sequence[Answer], expected: Expectation) -> list[Finding]:
    """Products of two sizes are 64 bits wide in an interpreted run."""
    reason = "products of two sizes are 64 bits wide"
    return each_answer(answers, expected.sample, lambda _, case: [Finding("", case, "all", Status.PASS, reason, 0, 0)])
