"""Drift: errors too small to show in one element, seen by their mean over many.

Slopes of the residual ŷ − R(y) on the base term, on LoRA's and on their sum are fitted by expert and column tile. Base
and LoRA terms are fitted jointly: where both weigh alike, a factor on LoRA's alone disappears in a slope on the sum and
in slopes fitted apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mxref.verification.arithmetic.accumulation import Accumulation
from mxref.verification.arithmetic.interval import Interval
from mxref.verification.arithmetic.metrics import ratio_statistics
from mxref.verification.arithmetic.thresholds import NAMED, TILE, directed_loss, rounding_pull
from mxref.verification.candidates.answer import Answer
from mxref.verification.cases.call import ONE_ROW
from mxref.verification.cases.case import Case, Sample
from mxref.verification.checks.elements import each_tensor
from mxref.verification.checks.expectation import Expectation
from mxref.verification.checks.finding import DriftMap, Finding, Status
from mxref.verification.checks.ratios import log2_counts
from mxref.verification.checks.strata import bounded, groups

_BASE, _LORA, _TOTAL = range(3)
_TERM = ("the base term", "LoRA's term", "the whole")
_SCALED = 2.0**-23
"""s and a product with it are rounded to fp32: where the other factors are alike, all in one direction."""
_SPREAD, _TOLERANCE = 0.5, 1e-2  # of criteria that are only reported


def no_drift(answers: Sequence[Answer], expected: Expectation) -> list[Finding]:
    """No stratum's mean relative error in Y, dX, dA and dB exceeds that of honest arithmetic.

    The sample must be no integer fixture: rounding errors must average out. An output that cannot be compared is left
    to `inside_intervals`.
    """

    def judge(case: str, tensor: str, got: Tensor, interval: Interval) -> Finding | None:
        fit = _fit(tensor, got, expected)
        return None if fit is None else _finding(case, tensor, got, interval, fit, expected.critical)

    return each_tensor(answers, expected, judge)


@dataclass(frozen=True)
class _Fit:
    """Slopes on the base term, on LoRA's and on their sum: β, standard error, and the b that arithmetic explains.

    fp64 [G, T+1, 3] on the CPU; NaN where not fitted.
    """

    groups: list[str]
    columns: list[str]
    slope: Tensor
    error: Tensor
    loss: Tensor
    skipped: int  # strata without a joint fit

    def excess(self) -> Tensor:
        """(|β| − b) / SE; −inf where nothing was fitted."""
        return ((self.slope.abs() - self.loss) / self.error).nan_to_num(nan=-math.inf, posinf=math.inf)

    def resolution(self, critical: float, term: int) -> float | None:
        """A uniform slope visible in the whole tensor in any noise: twice z·SE + b."""
        smallest = 2 * (critical * self.error[-1, -1, term] + self.loss[-1, -1, term])
        return float(smallest) if torch.isfinite(smallest) else None

    def map(self, case: str, tensor: str, critical: float, log2_ratio: dict[int, int]) -> DriftMap:
        """Each stratum's most significant slope."""
        z = self.slope / self.error
        worst = z.abs().nan_to_num(nan=-1.0).argmax(2, keepdim=True)
        strongest = z.gather(2, worst)[..., 0].numpy()
        return DriftMap(case, tensor, self.groups, self.columns, strongest, critical, log2_ratio)

    def describe(self, where: tuple[int, int, int]) -> str:
        """One slope in words, named after a likely bug."""
        group, tile, term = where
        factor, spread = 1 + float(self.slope[where]), float(self.error[where])
        place = f"{self.groups[group]}, {self.columns[tile]}"
        if abs(factor) <= NAMED:
            return f"{_TERM[term]} is missing in {place}"
        sign = " with its sign flipped" if factor < 0 else ""
        exponent = round(math.log2(abs(factor)))
        if exponent and abs(abs(factor) / 2.0**exponent - 1) <= NAMED:
            return f"exponent bug: {_TERM[term]} is scaled by 2^{exponent:+d}{sign} in {place}"
        if abs(factor + 1) <= NAMED:
            return f"{_TERM[term]} has its sign flipped in {place}"
        return f"{_TERM[term]} is scaled by {factor:.7g} ± {spread:.1g} in {place}"


def _finding(case: str, tensor: str, got: Tensor, interval: Interval, fit: _Fit, critical: float) -> Finding:
    excess = fit.excess()
    fitted, failed = int(torch.isfinite(fit.slope).sum()), int((excess > critical).sum())
    skipped = f"; {fit.skipped} strata with terms too alike for a joint fit" if fit.skipped else ""
    lost = int((~torch.isfinite(got) & bounded(interval, got.dtype)).sum())
    details: dict[str, float | str] = {"slopes": fitted, "skipped strata": fit.skipped, "critical z": critical}
    for term, name in ((_TOTAL, "resolution"), (_LORA, "resolution, LoRA")):
        resolution = fit.resolution(critical, term)
        if resolution is not None:
            details[name] = resolution
    details |= _reported(got, interval.exact)
    picture = fit.map(case, tensor, critical, log2_counts(got, interval))
    if lost:
        reason = f"{lost} of {got.numel()} elements are NaN or infinite where the reference is a number"
        return Finding("", case, tensor, Status.FAIL, reason, got.numel(), lost, details=details, picture=picture)
    if not fitted:
        reason = "nothing to fit: every term is zero"
        return Finding("", case, tensor, Status.PASS, reason, got.numel(), 0, details=details, picture=picture)
    worst = int(excess.argmax())
    where = (worst // 3 // excess.shape[1], worst // 3 % excess.shape[1], worst % 3)
    share = max(0.0, float(excess[where]) / critical)
    if failed:
        seen = f"|z| = {float(excess[where]):.1f} > {critical:.1f} here, and too large in {failed} of {fitted} slopes"
        text, status = f"{fit.describe(where)}; {seen}{skipped}", Status.FAIL
    else:
        text, status = f"no drift in {fitted} slopes, |z| ≤ {critical:.1f}{skipped}", Status.PASS
    return Finding("", case, tensor, status, text, got.numel(), 0, bound_share=share, details=details, picture=picture)


def _reported(got: Tensor, exact: Tensor) -> dict[str, float | str]:
    """Two criteria in wide use, for comparison; the spread passes a factor of two and lost rows."""
    mean, spread = ratio_statistics(got, exact)
    within = (got.double() - exact).abs() <= _TOLERANCE * (1 + exact.abs())
    return {
        "not judged: ratio mean": mean,
        "not judged: ratio std": spread,
        f"not judged: ratio std < {_SPREAD}": "pass" if spread < _SPREAD else "fail",
        f"not judged: allclose, rtol = atol = {_TOLERANCE}": "pass" if bool(within.all()) else "fail",
    }


def _fit(tensor: str, got: Tensor, expected: Expectation) -> _Fit | None:
    """Every stratum's slopes; None without a routed row."""
    labels, fits, losses, skipped = [], [], [], 0
    for group in groups(tensor, got, expected):
        labels.append(group.label)
        fits.append(group.slopes().cpu())
        losses.append(_losses(expected.sample, tensor, group.rows, expected.how))
        if group.lora is not None:
            skipped += int((fits[-1][0, :, _TOTAL].isfinite() & fits[-1][0, :, _LORA].isnan()).sum())
    if not fits:
        return None
    C = got.shape[0] if tensor == "dB" else got.shape[1]
    columns = [f"columns {c}–{min(c + TILE, C) - 1}" for c in range(0, C, TILE)] + ["all columns"]
    slope, variance = torch.stack(fits, 1)
    loss = torch.tensor(losses, dtype=torch.float64)[:, None, :] + rounding_pull(got.dtype)
    return _Fit(labels, columns, slope, variance.sqrt(), loss.expand_as(slope), skipped)


def _losses(sample: Sample, tensor: str, rows: int, how: Accumulation) -> tuple[float, float, float]:
    """b of each slope. LoRA's term also loses along Z or V and, if first, all through the base product."""
    problem = sample.problem
    lost = partial(directed_loss, how, problem.dtype)
    K, N, r = problem.K, problem.N, problem.rank
    if tensor in ("dA", "dB"):
        own = lost(rows, one_sign=_one_sign(sample.case)) + lost(N if tensor == "dA" else K) + _SCALED
        return own, own, own
    base, inner = (K, K) if tensor == "Y" else (N, N)
    first = lost(base, resident=True) if how.lora == "first" else 0.0
    lora = lost(inner) + lost(r) + first + _SCALED if r else 0.0
    return lost(base), lora, max(lost(base), lora)


def _one_sign(case: Case) -> float:
    """By which share of the terms of dA and dB one sign may prevail: of D different rows 3/√D, three deviations."""
    of = ((case.call.x, case.input_rows), (case.call.dOut, case.output_shape[0]))
    different = max(1 if layout in ONE_ROW else rows for layout, rows in of)
    return min(1.0, 3 / math.sqrt(max(different, 1)))
