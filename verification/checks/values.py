"""Values: equality where sums are exact, else the derived interval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mxref.verification.arithmetic.interval import Interval
from mxref.verification.candidates.answer import Answer
from mxref.verification.checks.elements import axes_of, comparable, compare, each_answer, unexpected
from mxref.verification.checks.expectation import Expectation
from mxref.verification.checks.finding import Finding, Status
from mxref.weights import MXWeights, decode_mxfp4


def equal(answers: Sequence[Answer], expected: Expectation) -> list[Finding]:
    """Every tensor equals the contract's result; −0 equals 0, NaN must be NaN, and infinities keep their sign."""

    def judge(answer: Answer, case: str) -> Iterator[Finding]:
        for tensor, value in expected.exact.items():
            if answer.rows and tensor not in answer.rows:
                continue
            got = comparable(answer, expected, tensor, case, Interval(value, value, value))
            if isinstance(got, Finding):
                yield got
                continue
            output, interval = got
            assert interval is not None
            axes = axes_of(expected.sample, tensor) if output is answer.outputs[tensor] else None
            yield compare(output, interval).finding(case, tensor, Status.PASS, "equal to the reference", axes)
        yield from unexpected(answer.outputs, case, expected.exact)

    return each_answer(answers, expected.sample, judge)


def inside_intervals(answers: Sequence[Answer], expected: Expectation) -> list[Finding]:
    """Every element lies inside the interval of the declared rounding points and accumulation.

    Where the reference is NaN or infinite the result must be of the same class. Undeclared accumulations pass weakly.
    """
    if expected.how.declared:
        status, reason = Status.PASS, "inside the bound of the declared accumulation"
    else:
        status, reason = Status.WEAK, "inside the order-free bound; the accumulation is not declared"

    def judge(answer: Answer, case: str) -> Iterator[Finding]:
        for tensor, interval in expected.accepted.items():
            got = comparable(answer, expected, tensor, case)
            if isinstance(got, Finding):
                yield got
                continue
            comparison = compare(got[0], interval)
            finding = comparison.finding(case, tensor, status, reason, axes_of(expected.sample, tensor))
            yield replace(finding, picture=comparison.sample(case, tensor))
        yield from unexpected(answer.outputs, case, expected.accepted)

    return each_answer(answers, expected.sample, judge)


def decoded_bits(answers: Sequence[Answer], expected: Expectation) -> list[Finding]:
    """A decoded weight stack is the reference's bit for bit, NaN for NaN."""
    weights = expected.sample.problem.expert_weights
    assert isinstance(weights, MXWeights)
    decoded = decode_mxfp4(weights, expected.sample.case.dtype)
    exact = decoded.double()

    def judge(answer: Answer, _: str) -> Iterator[Finding]:
        got, case = answer.outputs["W"], expected.sample.case.name
        if got is None or _form(got) != _form(decoded):
            reason = f"decode returned {_form(got)}; expected {_form(decoded)}"
            yield Finding("", case, "W", Status.FAIL, reason, decoded.numel(), decoded.numel())
            return
        signs = (torch.signbit(got) == torch.signbit(decoded)) | torch.isnan(decoded)
        comparison = compare(got, Interval(exact, exact, exact))
        comparison = replace(comparison, inside=comparison.inside & signs)
        axes = axes_of(expected.sample, "W")
        yield comparison.finding(case, "W", Status.PASS, "every bit equal to the reference", axes)

    return each_answer(answers, expected.sample, judge)


def _form(x: object) -> str:
    """What two tensors must share to be compared."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    kind = "" if x.layout is torch.strided else f"{x.layout} "
    return f"{kind}{tuple(x.shape)} {x.dtype} on {x.device}"
