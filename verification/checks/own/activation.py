"""The activation between the projections: every element of H and of its gradient inside its own interval."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxref.rounding import round_to
from mxref.verification.arithmetic.interval import Interval
from mxref.verification.arithmetic.own.activation import activation_intervals
from mxref.verification.arithmetic.own.elementary import elementary
from mxref.verification.candidates.answer import Answer
from mxref.verification.cases.own.activation import ActivationSample
from mxref.verification.checks.elements import compare, raised
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.checks.patterns import Axis

__all__ = ["right_activation"]


def right_activation(answers: Sequence[Answer], sample: ActivationSample) -> list[Finding]:
    """H and d(gate_up) are fp32 results rounded once, NaN and infinities where they belong; nothing else is written."""
    case, findings = sample.case, list[Finding]()
    form, how = case.form.for_dtype(torch.float32), elementary(sample.gate_up.device)
    accepted = activation_intervals(sample.gate_up.double(), sample.grad.double(), form, how)
    for answer in answers:
        if answer.error is not None:
            findings.append(raised(answer, case.name))
            continue
        findings += [_finding(sample, name, answer.outputs[name], interval) for name, interval in accepted.items()]
        for written in answer.written:
            status = Status.FAIL if written.inside or written.outside else Status.PASS
            reason = f"{written.inside} bytes of it and {written.outside} bytes around it were overwritten"
            reason = reason if status is Status.FAIL else "left as it was, and its surroundings too"
            count = written.inside + written.outside
            findings.append(Finding("", case.name, written.place, status, reason, written.elements, count))
    return findings


def _finding(sample: ActivationSample, tensor: str, got: object, interval: Interval) -> Finding:
    case, elements = sample.case, interval.exact.numel()
    wider = (torch.float32,) if sample.gate_up.device.type == "cpu" else ()
    if not isinstance(got, Tensor) or got.shape != interval.exact.shape or got.dtype not in (case.dtype, *wider):
        form = f"{got.dtype} {tuple(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
        reason = f"is {form}; expected {case.dtype} {tuple(interval.exact.shape)}"
        return Finding("", case.name, tensor, Status.FAIL, reason, elements, elements)
    low, high = (round_to(end, got.dtype) for end in (interval.low, interval.high))
    comparison = compare(got, Interval(low, high, interval.exact, interval.radius))
    axes = (Axis("row"), Axis("column"))
    return comparison.finding(case.name, tensor, Status.PASS, "inside the derived interval", axes)
