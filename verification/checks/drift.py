"""Drift: errors too small for any one element to show, seen by their mean over many.

Slopes of the residual ŷ − R(y) on the base term, on LoRA's and on their sum are fitted by expert and column tile. The
base and LoRA terms are fitted jointly: where both weigh alike, a factor on LoRA's alone disappears in a slope on the
sum, and in slopes fitted apart, but stands out in its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.rounding import round_to
from mxref.scattermoe import RoundingPoints, expert_order_gates, expert_order_inputs
from mxref.verification.arithmetic.accumulation import Accumulation
from mxref.verification.arithmetic.interval import Interval
from mxref.verification.arithmetic.metrics import ratio_statistics, ulp
from mxref.verification.arithmetic.thresholds import (
    ANY,
    FEW,
    NAMED,
    ON_A_GRID,
    SINGULAR,
    TILE,
    UNIFORM,
    copies,
    directed_loss,
    residual_variance,
    rounding_pull,
)
from mxref.verification.candidates.answer import Answer
from mxref.verification.checks.elements import each_tensor, stored
from mxref.verification.checks.expectation import Expectation
from mxref.verification.checks.finding import DriftMap, Finding, Status
from mxref.verification.checks.inherited import Draws, RowDraws, draws, shared_by_ranks, tiled, unrounded
from mxref.verification.checks.ratios import log2_counts

_BASE, _LORA, _TOTAL = range(3)
_TERM = ("the base term", "LoRA's term", "the whole")
_SPREAD, _TOLERANCE = 0.5, 1e-2  # of criteria that are only reported: nothing is decided by them


def no_drift(answers: Sequence[Answer], expected: Expectation) -> list[Finding]:
    """No stratum's mean relative error is larger than honest arithmetic makes it, in Y, dX, dA and dB.

    The sample must be ordinary data, no integer fixture: rounding errors must be there to average out. An output that
    cannot be compared at all is `inside_intervals`' finding.
    """

    def judge(case: str, tensor: str, got: Tensor, interval: Interval) -> Finding | None:
        fit = _fit(tensor, got, expected)
        return None if fit is None else _finding(case, tensor, got, interval, fit, expected.critical)

    return each_tensor(answers, expected, judge)


@dataclass(frozen=True)
class _Group:
    """Rows that are judged together, an expert's or all; terms and residual in units of the residual's σ, [R, C].

    Attributes:
        label: in words.
        base, lora: the terms.
        residual: what the output is off by.
        inverse: 1/σ.
        inherited: what its errors share.
        rows: routed rows: terms in a sum over them.
    """

    label: str
    base: Tensor
    lora: Tensor | None
    residual: Tensor
    inverse: Tensor
    inherited: list[Draws | RowDraws]
    rows: int

    def slopes(self) -> Tensor:
        """Slopes by column tile, then of all columns, with their variances: fp64 [2, T+1, 3], NaN where nothing fits.

        Weighted least squares: a slope is Σ a·residual, a = α·base + β·LoRA. Elements' own errors are a draw each, of
        variance 1, and give it the variance Σa²; inherited ones add theirs.
        """
        base, residual = self.base, self.residual
        lora = torch.zeros_like(base) if self.lora is None else self.lora
        products = ((base, base), (base, lora), (lora, lora), (base, residual), (lora, residual))
        bb, bl, ll, bq, lq = tiled(torch.stack([(a * b).sum(0) for a, b in products]))
        determinant = bb * ll - bl.square()
        determinant = torch.where(determinant > SINGULAR * bb * ll, determinant, torch.nan)
        total = bb + 2 * bl + ll
        both = 1 / torch.where(total > 0, total, torch.nan)
        weights = ((ll / determinant, -bl / determinant), (-bl / determinant, bb / determinant), (both, both))
        found = []
        for α, β in weights:
            own = α.square() * bb + 2 * α * β * bl + β.square() * ll
            found.append(torch.stack((α * bq + β * lq, own + self._inherited(α, β, lora))))
        return torch.stack(found, -1)

    def _inherited(self, α: Tensor, β: Tensor, lora: Tensor) -> Tensor | float:
        """The variance of inherited errors by column tile, then of all columns."""
        if not self.inherited:
            return 0.0
        columns = self.base.shape[1]
        of_tiles, of_all = (x[:-1].repeat_interleave(TILE)[:columns] for x in (α, β)), (α[-1], β[-1])
        tiles, together = (self.inverse * (a * self.base + b * lora) for a, b in (of_tiles, of_all))
        return sum(each.variance(tiles, together) for each in self.inherited)


@dataclass(frozen=True)
class _Fit:
    """Slopes on the base term, on LoRA's and on their sum: β, its standard error, and the b that arithmetic explains.

    All fp64 [G, T+1, 3] on the CPU; NaN where a slope was not fitted.
    """

    groups: list[str]
    columns: list[str]
    slope: Tensor
    error: Tensor
    loss: Tensor
    skipped: int  # strata without a joint fit

    def excess(self) -> Tensor:
        """(|β| − b) / SE, to be held against z; −inf where nothing was fitted."""
        return ((self.slope.abs() - self.loss) / self.error).nan_to_num(nan=-math.inf, posinf=math.inf)

    def resolution(self, critical: float, term: int) -> float | None:
        """A uniform slope that stays visible in the whole tensor whatever the noise: twice z·SE + b."""
        smallest = 2 * (critical * self.error[-1, -1, term] + self.loss[-1, -1, term])
        return float(smallest) if torch.isfinite(smallest) else None

    def map(self, case: str, tensor: str, critical: float, log2_ratio: dict[int, int]) -> DriftMap:
        """Each stratum's most significant slope."""
        z = self.slope / self.error
        worst = z.abs().nan_to_num(nan=-1.0).argmax(2, keepdim=True)
        strongest = z.gather(2, worst)[..., 0].numpy()
        return DriftMap(case, tensor, self.groups, self.columns, strongest, critical, log2_ratio)

    def describe(self, where: tuple[int, int, int]) -> str:
        """One slope in words, named after the bug that it looks like."""
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
    lost = int((~torch.isfinite(got) & _bounded(interval, got.dtype)).sum())
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
    """Two criteria in wide use, for comparison; the spread passes a factor of two and any number of lost rows."""
    mean, spread = ratio_statistics(got, exact)
    within = (got.double() - exact).abs() <= _TOLERANCE * (1 + exact.abs())
    return {
        "not judged: ratio mean": mean,
        "not judged: ratio std": spread,
        f"not judged: ratio std < {_SPREAD}": "pass" if spread < _SPREAD else "fail",
        f"not judged: allclose, rtol = atol = {_TOLERANCE}": "pass" if bool(within.all()) else "fail",
    }


def _fit(tensor: str, got: Tensor, expected: Expectation) -> _Fit | None:
    """Every stratum's slopes; None for a problem without a routed row."""
    interval, problem = expected.accepted[tensor], expected.sample.problem
    assert interval.radius is not None
    dtype = got.dtype if got.dtype in (torch.bfloat16, torch.float16) else torch.float32
    rounding = _rounding(problem, tensor, expected.points)
    variance = residual_variance(ulp(interval.exact, dtype), interval.radius, rounding)
    if tensor == "dB":
        variance += torch.as_tensor(shared_by_ranks(expected)).square()
    sigma = (variance * copies(unrounded(tensor, expected))).sqrt()
    usable = _bounded(interval, got.dtype) & torch.isfinite(got) & torch.isfinite(sigma)
    # Held against the rounded reference: a sum that hardly leaves the grid (a bias and next to nothing, equal rows
    # under gates whose sum is 1) rounds back every time, and that is no slope of the candidate's.
    nearest = interval.exact.float().double() if dtype == torch.float32 else round_to(interval.exact, dtype)
    residual = torch.where(usable, (got.double() - nearest) / sigma, 0.0)
    inverse = torch.where(usable, 1 / sigma, 0.0)
    make = _gradient_groups if tensor in ("dA", "dB") else _row_groups
    labels, fits, losses, skipped = [], [], [], 0
    for group in make(tensor, expected, inverse, residual):
        labels.append(group.label)
        fits.append(group.slopes().cpu())
        losses.append(_losses(problem, tensor, group.rows, expected.how))
        if group.lora is not None:
            skipped += int((fits[-1][0, :, _TOTAL].isfinite() & fits[-1][0, :, _LORA].isnan()).sum())
    if not fits:
        return None
    C = got.shape[0] if tensor == "dB" else got.shape[1]
    columns = [f"columns {c}–{min(c + TILE, C) - 1}" for c in range(0, C, TILE)] + ["all columns"]
    slope, variance = torch.stack(fits, 1)
    loss = torch.tensor(losses, dtype=torch.float64)[:, None, :] + rounding_pull(dtype)
    return _Fit(labels, columns, slope, variance.sqrt(), loss.expand_as(slope), skipped)


def _bounded(interval: Interval, dtype: torch.dtype) -> Tensor:
    """Where every accepted value is finite. What may round to infinity has no error to be measured: to leave out those
    alone that did would pull the mean of the rest down."""
    ends = stored(interval, dtype)
    return torch.isfinite(interval.exact) & torch.isfinite(ends.low) & torch.isfinite(ends.high)


def _rounding(problem: Problem, tensor: str, points: RoundingPoints) -> Tensor | float:
    """Variance of the output's rounding: dX over slots sums rounded values, dA and dB may sum next to nothing."""
    if tensor == "dX" and not problem.grouped_in and problem.k > 1 and points.dtype is not None:
        return ON_A_GRID
    if tensor not in ("dA", "dB"):
        return UNIFORM
    rows = torch.diff(problem.expert_offsets, prepend=problem.expert_offsets.new_zeros(1))
    by_expert = torch.where(rows <= FEW, ANY, UNIFORM).double().repeat_interleave(problem.rank)
    return by_expert[:, None] if tensor == "dA" else by_expert


def _losses(problem: Problem, tensor: str, rows: int, how: Accumulation) -> tuple[float, float, float]:
    """b of each slope. LoRA's term has lost along Z or V too, and, if it comes first, all through the base product."""

    def lost(terms: int, resident: bool = False) -> float:
        return directed_loss(how, problem.dtype, terms, resident)

    K, N, r = problem.K, problem.N, problem.rank
    if tensor in ("dA", "dB"):
        own = lost(rows) + lost(N if tensor == "dA" else K)
        return own, own, own
    base, inner = (K, K) if tensor == "Y" else (N, N)
    lora = lost(inner) + lost(r) + (lost(base, resident=True) if how.lora == "first" else 0.0) if r else 0.0
    return lost(base), lora, max(lost(base), lora)


def _gradient_groups(tensor: str, expected: Expectation, inverse: Tensor, residual: Tensor) -> Iterator[_Group]:
    """dA [E·r, K] and dB, turned to [E·r, N], by expert: one term only."""
    exact, problem = expected.accepted[tensor].exact, expected.sample.problem
    if tensor == "dB":
        exact, inverse, residual = exact.T, inverse.T, residual.T
    scaled = torch.where(inverse > 0, exact * inverse, 0.0)
    r, most, every = problem.rank, 0, list[Draws | RowDraws]()
    for e, start, end in problem.segments():
        own, rows = slice(e * r, (e + 1) * r), torch.arange(r, device=scaled.device)
        inherited = list(draws(tensor, expected, e, start, end, rows))
        yield _Group(f"expert {e}", scaled[own], None, residual[own], inverse[own], inherited, end - start)
        every += [replace(each, rows=each.rows + e * r) for each in inherited]
        most = max(most, end - start)
    if most:
        yield _Group("all experts", scaled, None, residual, inverse, every, most)


def _row_groups(tensor: str, expected: Expectation, inverse: Tensor, residual: Tensor) -> Iterator[_Group]:
    """Y and dX by expert: its own share of each row that it has a part in, then all shares together."""
    problem = expected.sample.problem
    target = _targets(problem, tensor)
    base = torch.zeros_like(expected.fwd.y.exact if tensor == "Y" else expected.bwd.d.exact)
    x, dy = expert_order_inputs(problem), expected.bwd.dy.value
    for e, start, end in problem.segments():
        own, W = slice(start, end), problem.expert_weight(e)
        base[own] = x[own] @ W if tensor == "Y" else dy[own] @ W.T
        if tensor == "Y" and problem.expert_biases is not None:
            base[own] += problem.expert_biases[e].detach().double()
    lora = (expected.fwd.y.exact if tensor == "Y" else expected.bwd.d.exact) - base if problem.rank else None
    if tensor == "Y" and problem.gates is not None:
        gates = expert_order_gates(problem)[:, None]
        base, lora = gates * base, None if lora is None else gates * lora
    segments = list(problem.segments())
    groups = [(f"expert {e}", [(e, start, end)]) for e, start, end in segments]
    for label, parts in [*groups, *([("all experts", segments)] if segments else [])]:
        rows = torch.cat([torch.arange(start, end, device=x.device) for _, start, end in parts])
        into, slot = torch.unique(target[rows], return_inverse=True)
        scale = inverse[into]

        def share(term: Tensor, rows: Tensor = rows, slot: Tensor = slot, scale: Tensor = scale) -> Tensor:
            summed = torch.zeros_like(scale).index_add_(0, slot, term[rows])
            return torch.where(scale > 0, summed * scale, 0.0)

        own = slot.split([end - start for _, start, end in parts])
        inherited = [each for part, at in zip(parts, own, strict=True) for each in draws(tensor, expected, *part, at)]
        shares = share(base), None if lora is None else share(lora)
        yield _Group(label, *shares, residual[into], scale, inherited, rows.numel())


def _targets(problem: Problem, tensor: str) -> Tensor:
    """Row of Y or dX that each routed row, in expert order, has a part in: int64 [P]."""
    positions = problem.row_positions()
    if tensor == "dX":
        return problem.row_sources()
    if problem.gates is not None:
        return positions // problem.gates.shape[1]
    return torch.arange(problem.P, device=problem.device) if problem.grouped_out else positions
