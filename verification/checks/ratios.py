"""Signs and exponents of an output against the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mxref.verification.arithmetic.interval import Interval
from mxref.verification.candidates.answer import Answer
from mxref.verification.checks.elements import each_tensor
from mxref.verification.checks.expectation import Expectation
from mxref.verification.checks.finding import Counterexample, Finding, Status

_HALF_OCTAVE = 2.0**0.5  # beyond it a ratio rounds to another power of two


def right_signs(answers: Sequence[Answer], expected: Expectation) -> list[Finding]:
    """Every sign where the accepted interval excludes zero; a zero has neither."""
    return each_tensor(answers, expected, _signs)


def right_exponents(answers: Sequence[Answer], expected: Expectation) -> list[Finding]:
    """⌊log2 |got / exact|⌉ = 0 wherever the accepted interval keeps it there."""
    return each_tensor(answers, expected, _exponents)


def log2_counts(got: Tensor, interval: Interval) -> dict[int, int]:
    """Elements by ⌊log2 |got / exact|⌉ where honest rounding keeps it at 0; zeros and non-finite results left out."""
    clear, octave = _octaves(got, interval)
    values, counts = torch.unique(octave[clear & (got != 0) & torch.isfinite(got)], return_counts=True)
    return {int(value): int(count) for value, count in zip(values, counts, strict=True)}


def _signs(case: str, tensor: str, got: Tensor, interval: Interval) -> Finding:
    certain = (interval.low > 0) | (interval.high < 0)
    wrong = certain & (torch.sign(got.double()) != torch.sign(interval.exact)) & ~torch.isnan(got)
    judged, violations = int(certain.sum()), int(wrong.sum())
    if not violations:
        reason = f"{judged} of {got.numel()} signs are certain, and agree"
        return Finding("", case, tensor, Status.PASS, reason, judged, 0)
    zeros = int((wrong & (got == 0)).sum())
    also = f", {zeros} of them are zero" if zeros else ""
    reason = f"{violations} of {judged} certain signs are wrong{also}"
    shown = _first(wrong, got, interval)
    return Finding("", case, tensor, Status.FAIL, reason, judged, violations, counterexample=shown)


def _exponents(case: str, tensor: str, got: Tensor, interval: Interval) -> Finding:
    clear, octave = _octaves(got, interval)
    vanished = clear & (got == 0)
    wrong = vanished | (clear & (octave != 0))
    judged, violations = int(clear.sum()), int(wrong.sum())
    if not violations:
        reason = f"log2 |ratio| rounds to 0 in {judged} elements"
        return Finding("", case, tensor, Status.PASS, reason, judged, 0)
    shown = _first(wrong, got, interval)
    powers = wrong & ~vanished & _is_power(got, octave, interval)
    if int(powers.sum()) * 2 > violations:
        exponent = int(octave[powers].mode().values)
        same = powers & (octave == exponent)
        count = f"ratio 2^{exponent:+d} in {_extent(same)}"
        reason, shown = f"exponent bug: {count}", _first(same, got, interval)
        if int(same.sum()) < violations:
            reason += f"; {violations - int(same.sum())} further elements are off by other ratios"
    elif int(vanished.sum()) * 2 > violations:
        whole = clear.any(-1) & (vanished | ~clear).all(-1)
        rows = f"{int(whole.sum())} of {whole.numel()} rows are zero" if bool(whole.any()) else "zeros"
        reason, shown = f"dropped: {rows}; {_extent(vanished)} vanish", _first(vanished, got, interval)
    else:
        reason = f"ratio beyond √2, no power of two, in {_extent(wrong)}: values from elsewhere, or a missing term"
    return Finding("", case, tensor, Status.FAIL, reason, judged, violations, counterexample=shown)


def _octaves(got: Tensor, interval: Interval) -> tuple[Tensor, Tensor]:
    """Where every accepted value is within half an octave of the exact one, and ⌊log2 |got / exact|⌉ as int64."""
    exact = interval.exact
    clear = torch.isfinite(exact) & (exact != 0) & ~torch.isnan(got)
    for end in (interval.low, interval.high):
        clear &= (end / exact > 1 / _HALF_OCTAVE) & (end / exact < _HALF_OCTAVE)
    ratio = torch.where(clear, (got.double() / exact).abs(), 1.0)
    return clear, torch.log2(ratio).round().clamp(-2000, 2000).long()


def _is_power(got: Tensor, octave: Tensor, interval: Interval) -> Tensor:
    """Whether got is an accepted value times 2^octave."""
    restored = got.double().abs() * torch.exp2(-octave.double())
    ends = interval.low.abs(), interval.high.abs()
    return (restored >= torch.minimum(*ends)) & (restored <= torch.maximum(*ends))


def _extent(where: Tensor) -> str:
    columns = int(where.flatten(0, -2).any(0).sum())
    return f"{columns} of {where.shape[-1]} columns ({int(where.sum())} of {where.numel()} elements)"


def _first(where: Tensor, got: Tensor, interval: Interval) -> Counterexample:
    index = tuple(int(i) for i in where.nonzero()[0])
    value, exact, low, high = (float(x[index]) for x in (got, interval.exact, interval.low, interval.high))
    ratio = value / exact if exact else math.nan
    return Counterexample(index, value, exact, low, high, f"ratio {ratio:.6g}")
