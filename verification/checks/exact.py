"""Guards: metrics and bounds turned into verdicts. Each one can be used alone.

    decode_guard    every code with every scale byte, bit for bit, forward and backward
    integer_guard   fixtures that are exact in any order of summation: equality on every tensor
    interval_guard  ordinary data: every element within its derived bound

A guard never raises for what a candidate does: an exception, a missing or malformed tensor, a NaN where the reference
is finite are findings. NotImplementedError means that the candidate does not cover the case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.rounding import round_to
from mxref.scattermoe import Backward, Forward, RoundingPoints, backward, forward
from mxref.verification.arithmetic.accumulation import Accumulation
from mxref.verification.arithmetic.bounds import Interval, intervals
from mxref.verification.arithmetic.metrics import rms, ulp_error
from mxref.verification.cases.case import Sample
from mxref.verification.cases.elements import all_elements, finite_sample, nonfinite_samples
from mxref.verification.checks.finding import Counterexample, ErrorSample, Finding, FloatArray, Status
from mxref.weights import decode_mxfp4

__all__ = [
    "Expectation", "Judged", "attempt", "decode_guard", "expect", "integer_guard", "interval_guard", "malformed",
    "raised", "reference",
]  # fmt: skip

_OPERAND = {"dX": "inputs", "dA": "lora_A", "dB": "lora_B", "dbias": "expert_biases", "dgates": "gates"}
_PLOT_POINTS = 20_000


class Judged(Protocol):
    """What a guard needs of a candidate; `candidates.Candidate` is one.

    `run` returns "Y" and the gradients "dX", "dA", "dB", "dbias", "dgates" of the operands that are there. A key that
    is missing means that the candidate does not compute it, a None that it computed nothing. An optional attribute
    `decode`, called with (MXWeights, dtype), returns [E, N, K].
    """

    def run(self, sample: Sample) -> Mapping[str, Tensor | None]:
        """One forward and one backward pass on copies of the sample's operands."""
        ...


@dataclass(frozen=True)
class Expectation:
    """What the reference says about one sample under one declaration: both passes, and the accepted intervals."""

    fwd: Forward
    bwd: Backward
    accepted: dict[str, Interval]


def expect(sample: Sample, points: RoundingPoints, accumulation: Accumulation) -> Expectation:
    """The reference's passes and the intervals around them; the costly half of a judgement, for guards to share."""
    fwd = forward(sample.problem, points)
    bwd = backward(sample.problem, fwd, sample.grad_out, points)
    return Expectation(fwd, bwd, intervals(sample.problem, fwd, bwd, sample.grad_out, points, accumulation))


def reference(sample: Sample, points: RoundingPoints) -> dict[str, Tensor]:
    """The reference's outputs, rounded as declared: fp64, for every tensor that the sample's problem has."""
    fwd = forward(sample.problem, points)
    bwd = backward(sample.problem, fwd, sample.grad_out, points)
    named = {
        "Y": fwd.out, "dX": bwd.dx, "dA": bwd.dA, "dB": bwd.dB, "dbias": bwd.dbias, "dgates": bwd.dgates
    }  # fmt: skip
    return {name: rounded.value for name, rounded in named.items() if rounded is not None}


def decode_guard(
    candidate: Judged, device: torch.device | str, dtype: torch.dtype, nonfinite: bool = True
) -> list[Finding]:
    """Exhaustive: 16 codes × 256 scale bytes × 32 places of a block, through the forward product and dX's.

    Values compare equal (which ignores the sign of a zero that a sum has lost); NaN must be NaN, infinities keep their
    sign. A candidate's own `decode` is compared bit for bit besides, −0 included. Without `nonfinite` the products see
    only scale bytes under which every code is finite.
    """
    findings = []
    for sample in (finite_sample(dtype, device), *(nonfinite_samples(dtype, device) if nonfinite else ())):
        findings += _equality("decode", candidate, sample)
    decode = getattr(candidate, "decode", None)
    if decode is not None:
        weights = all_elements().to(device)
        name = f"every element, {str(dtype).removeprefix('torch.')}"
        try:
            decoded = decode(weights, dtype)
        except Exception as error:
            findings.append(raised("decode", name, error))
        else:
            findings.append(_same_bits(name, decoded, decode_mxfp4(weights, dtype)))
    return findings


def integer_guard(candidate: Judged, sample: Sample) -> list[Finding]:
    """Equality on every tensor of a sample whose sums are exact in any order (see `integer`)."""
    return _equality("integer", candidate, sample)


def interval_guard(
    candidate: Judged,
    sample: Sample,
    points: RoundingPoints,
    accumulation: Accumulation,
    expected: Expectation | None = None,
) -> tuple[list[Finding], list[ErrorSample]]:
    """Every element inside the interval that the declared rounding points and accumulation leave it.

    Where the reference is NaN or infinite the result must be of the same class. A pass under an undeclared accumulation
    is a weak one. `expected` is `expect(sample, points, accumulation)`, where it is there already.
    """
    outputs = attempt("interval", candidate, sample)
    if isinstance(outputs, Finding):
        return [outputs], []
    accepted = (expected or expect(sample, points, accumulation)).accepted
    if accumulation.declared:
        status, reason = Status.PASS, "inside the bound of the declared accumulation"
    else:
        status, reason = Status.WEAK, "inside the order-free bound; the accumulation is not declared"
    findings, samples = [], []
    for tensor, interval in accepted.items():
        unusable = malformed("interval", sample, tensor, outputs)
        if unusable is not None:
            findings.append(unusable)
            continue
        got = outputs[tensor]
        assert got is not None
        comparison = _compare(got, interval)
        findings.append(comparison.finding("interval", sample.case.name, tensor, status, reason))
        samples.append(comparison.sample(sample.case.name, tensor))
    return findings + _unexpected("interval", sample, outputs, accepted), samples


@dataclass(frozen=True)
class _Comparison:
    """Elementwise result of holding an output against its interval; fp64 but `inside`."""

    got: Tensor
    interval: Interval
    inside: Tensor
    allowed: Tensor  # accepted distance on the side where `got` lies
    ulps: Tensor

    def finding(self, guard: str, case: str, tensor: str, status: Status, reason: str) -> Finding:
        exact, elements = self.interval.exact, self.got.numel()
        violations = elements - int(self.inside.sum())
        counterexample = None
        if violations:
            status, reason = Status.FAIL, f"{violations} of {elements} elements outside what is accepted"
            counterexample = self._first_outside()
        comparable = torch.isfinite(self.got) & torch.isfinite(exact)
        ulps, distance = self.ulps[comparable], (self.got - exact).abs()[comparable]
        share = torch.where(distance == 0, 0.0, distance / self.allowed[comparable])
        any_left = bool(comparable.any())
        return Finding(
            guard, case, tensor, status, reason, elements, violations,
            max_ulp=float(ulps.abs().max()) if any_left else None,
            rms_ulp=rms(ulps) if any_left else None,
            bound_share=float(share.max()) if any_left else None,
            counterexample=counterexample,
        )  # fmt: skip

    def _first_outside(self) -> Counterexample:
        where = tuple(int(index) for index in (~self.inside).nonzero()[0])
        values = (self.got, self.interval.exact, self.interval.low, self.interval.high)
        got, exact, low, high = (float(x[where]) for x in values)
        note = ""
        if np.isnan(got) and not np.isnan(exact):
            note = "NaN where the reference is a number"
        elif not np.isfinite(exact):
            note = "the reference is not finite; the result must be of the same class"
        return Counterexample(where, got, exact, low, high, note)

    def sample(self, case: str, tensor: str) -> ErrorSample:
        """At most 20,000 elements, evenly spaced over the flattened tensor, finite ones only."""
        exact = self.interval.exact
        stride = max(1, -(-exact.numel() // _PLOT_POINTS))

        def thin(x: Tensor) -> FloatArray:
            array: FloatArray = x.flatten()[::stride].cpu().numpy()
            return array

        arrays = [thin(x) for x in (exact.abs(), self.got - exact, self.allowed, self.ulps)]
        keep = np.all([np.isfinite(array) for array in arrays], axis=0)
        return ErrorSample(case, tensor, *(array[keep] for array in arrays))


def _compare(got: Tensor, interval: Interval) -> _Comparison:
    value, exact = got.double(), interval.exact
    low, high = interval.low, interval.high
    if got.dtype in (torch.bfloat16, torch.float16):  # stored narrower than declared: one more, monotonic rounding
        low, high = round_to(low, got.dtype), round_to(high, got.dtype)
    inside = (value >= low) & (value <= high)
    same_class = (value == exact) | (torch.isnan(value) & torch.isnan(exact))
    inside = torch.where(torch.isfinite(exact), inside, same_class)
    allowed = torch.where(value > exact, high - exact, exact - low)
    return _Comparison(value, Interval(low, high, exact), inside, allowed, ulp_error(got, exact, got.dtype))


def _equality(guard: str, candidate: Judged, sample: Sample) -> list[Finding]:
    outputs = attempt(guard, candidate, sample)
    if isinstance(outputs, Finding):
        return [outputs]
    expected = reference(sample, RoundingPoints.contract(sample.problem.dtype))
    findings = []
    for tensor, value in expected.items():
        unusable = malformed(guard, sample, tensor, outputs)
        got = outputs.get(tensor)
        if unusable is not None or got is None:
            findings += [unusable] if unusable is not None else []
            continue
        comparison = _compare(got, Interval(value, value, value))
        findings.append(comparison.finding(guard, sample.case.name, tensor, Status.PASS, "equal to the reference"))
    return findings + _unexpected(guard, sample, outputs, expected)


def _same_bits(case: str, got: object, expected: Tensor) -> Finding:
    """A decoded weight stack against the reference's: equal values, equal signs of zero, NaN for NaN."""
    if not isinstance(got, Tensor) or got.shape != expected.shape or got.dtype != expected.dtype:
        form = f"{tuple(got.shape)} {got.dtype}" if isinstance(got, Tensor) else type(got).__name__
        reason = f"decode returned {form}; expected {tuple(expected.shape)} {expected.dtype}"
        return Finding("decode", case, "W", Status.FAIL, reason, expected.numel(), expected.numel())
    exact = expected.double()
    comparison = _compare(got, Interval(exact, exact, exact))
    signs = (torch.signbit(got) == torch.signbit(expected)) | torch.isnan(expected)
    comparison = _Comparison(
        comparison.got, comparison.interval, comparison.inside & signs, comparison.allowed, comparison.ulps
    )
    return comparison.finding("decode", case, "W", Status.PASS, "every bit equal to the reference")


def attempt(guard: str, candidate: Judged, sample: Sample) -> Mapping[str, Tensor | None] | Finding:
    """The candidate's outputs, or a finding about what it raised."""
    try:
        return candidate.run(sample)
    except Exception as error:  # whatever a candidate raises is a finding about it
        return raised(guard, sample.case.name, error)


def raised(guard: str, case: str, error: Exception) -> Finding:
    """What a candidate raised, as a finding."""
    if isinstance(error, NotImplementedError):
        return Finding(guard, case, "all", Status.NOT_COVERED, str(error) or "NotImplementedError", 0, 0)
    return Finding(guard, case, "all", Status.FAIL, f"raised {type(error).__name__}: {error}", 0, 0)


def malformed(guard: str, sample: Sample, tensor: str, outputs: Mapping[str, Tensor | None]) -> Finding | None:
    """A finding if an output cannot be compared at all."""
    shape, dtypes = _form(sample, tensor)
    elements = int(np.prod(shape))

    def finding(status: Status, reason: str) -> Finding:
        violations = elements if status is Status.FAIL else 0
        return Finding(guard, sample.case.name, tensor, status, reason, elements, violations)

    if tensor not in outputs:
        return finding(Status.NOT_COVERED, "the candidate does not compute it")
    got = outputs[tensor]
    if got is None:
        return finding(Status.FAIL, f"no gradient reached {_OPERAND[tensor]}" if tensor in _OPERAND else "no output")
    if tuple(got.shape) != shape:
        return finding(Status.FAIL, f"has shape {tuple(got.shape)}; expected {shape}")
    if got.dtype not in dtypes:
        return finding(Status.FAIL, f"is {got.dtype}; expected {dtypes[0]}")
    if got.device != sample.problem.device:
        return finding(Status.FAIL, f"lies on {got.device}; expected {sample.problem.device}")
    return None


def _form(sample: Sample, tensor: str) -> tuple[tuple[int, ...], tuple[torch.dtype, ...]]:
    """Expected shape, and accepted dtypes, the regular one first; on a CPU wider results are accepted too."""
    problem: Problem = sample.problem
    operand: Tensor = problem.inputs if tensor == "Y" else getattr(problem, _OPERAND[tensor])
    shape = tuple(sample.grad_out.shape if tensor == "Y" else operand.shape)
    wider = (torch.float32, torch.float64) if problem.device.type == "cpu" else ()
    return shape, (operand.dtype, *wider)


def _unexpected(
    guard: str, sample: Sample, outputs: Mapping[str, Tensor | None], expected: Mapping[str, object]
) -> list[Finding]:
    """Gradients of what is frozen or absent."""
    extra = [name for name, output in outputs.items() if name not in expected and output is not None]
    reason = "a gradient that nothing asks for: its operand is frozen or absent"
    return [Finding(guard, sample.case.name, name, Status.FAIL, reason, 0, 0) for name in extra]
