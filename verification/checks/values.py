"""Values: equality where every sum is exact, and the derived interval where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mxref.verification.arithmetic.bounds import Interval
from mxref.verification.candidates.answer import Answer
from mxref.verification.checks.elements import axes_of, comparable, compare, name_of, raised, unexpected
from mxref.verification.checks.expectation import Expectation
from mxref.verification.checks.finding import Finding, Status
from mxref.weights import MXWeights, decode_mxfp4

__all__ = ["decoded_bits", "equal", "inside_intervals"]


def equal(answers: Sequence[Answer], expected: Expectation) -> list[Finding]:
    """Every tensor equals the contract's result; −0 equals 0, NaN must be NaN, and infinities keep their sign."""
    findings: list[Finding] = []
    for answer in answers:
        case = name_of(answer, expected.sample)
        if answer.error is not None:
            findings.append(raised(answer, case))
            continue
        for tensor, value in expected.exact.items():
            if answer.rows and tensor not in answer.rows:
                continue
            got = comparable(answer, expected.sample, tensor, case, Interval(value, value, value))
            if isinstance(got, Finding):
                findings.append(got)
                continue
            output, interval = got
            assert interval is not None
            comparison = compare(output, interval)
            axes = axes_of(expected.sample, tensor) if output is answer.outputs[tensor] else None
            findings.append(comparison.finding(case, tensor, Status.PASS, "equal to the reference", axes))
        findings += unexpected(answer.outputs, case, expected.exact)
    return findings


def inside_intervals(answers: Sequence[Answer], expected: Expectation) -> list[Finding]:
    """Every element lies inside the interval that the declared rounding points and accumulation leave it.

    Where the reference is NaN or infinite the result must be of the same class. A pass under an undeclared accumulation
    is a weak one.
    """
    if expected.how.declared:
        status, reason = Status.PASS, "inside the bound of the declared accumulation"
    else:
        status, reason = Status.WEAK, "inside the order-free bound; the accumulation is not declared"
    findings: list[Finding] = []
    for answer in answers:
        case = name_of(answer, expected.sample)
        if answer.error is not None:
            findings.append(raised(answer, case))
            continue
        for tensor, interval in expected.accepted.items():
            got = comparable(answer, expected.sample, tensor, case)
            if isinstance(got, Finding):
                findings.append(got)
                continue
            comparison = compare(got[0], interval)
            finding = comparison.finding(case, tensor, status, reason, axes_of(expected.sample, tensor))
            findings.append(replace(finding, picture=comparison.sample(case, tensor)))
        findings += unexpected(answer.outputs, case, expected.accepted)
    return findings


def decoded_bits(answers: Sequence[Answer], expected: Expectation) -> list[Finding]:
    """A decoded weight stack is the reference's bit for bit: equal values, equal signs of zero, NaN for NaN."""
    weights, dtype, case = expected.sample.problem.expert_weights, expected.sample.case.dtype, expected.sample.case.name
    assert isinstance(weights, MXWeights)
    findings = []
    for answer in answers:
        if answer.error is not None:
            findings.append(raised(answer, case))
            continue
        got, decoded = answer.outputs["W"], decode_mxfp4(weights, dtype)
        if _form(got) != _form(decoded):
            reason = f"decode returned {_form(got)}; expected {_form(decoded)}"
            findings.append(Finding("", case, "W", Status.FAIL, reason, decoded.numel(), decoded.numel()))
            continue
        assert got is not None
        exact = decoded.double()
        comparison = compare(got, Interval(exact, exact, exact))
        signs = (torch.signbit(got) == torch.signbit(decoded)) | torch.isnan(decoded)
        comparison = replace(comparison, inside=comparison.inside & signs)
        findings.append(
            comparison.finding(
                case, "W", Status.PASS, "every bit equal to the reference", axes_of(expected.sample, "W")
            )
        )
    return findings


def _form(x: object) -> str:
    """What two tensors must share to be compared."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    kind = "" if x.layout is torch.strided else f"{x.layout} "
    return f"{kind}{tuple(x.shape)} {x.dtype} on {x.device}"
