"""Strata of an output, by expert and column tile: terms of the slopes, residual and its errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.rounding import round_to
from mxref.scattermoe import RoundingPoints, expert_order_gates, expert_order_inputs
from mxref.verification.arithmetic.interval import Interval
from mxref.verification.arithmetic.metrics import ulp
from mxref.verification.arithmetic.thresholds import (
    ANY,
    FEW,
    ON_A_GRID,
    SINGULAR,
    TILE,
    UNIFORM,
    copies,
    residual_variance,
)
from mxref.verification.checks.elements import stored
from mxref.verification.checks.expectation import Expectation
from mxref.verification.checks.inherited import (
    Inherited,
    OwnDraws,
    Sources,
    shared_by_ranks,
    sums_rounded_rows,
    tiled,
)

_SMALL = 2**14
"""Elements of a group whose three slopes' variances are computed at once: then Python takes the time."""


@dataclass(frozen=True)
class Group:
    """Rows judged together, an expert's or all; terms and residual times an element's weight, [R, C].

    Attributes:
        base, lora: the terms.
        residual: what the output is off by.
        weight: 1/σ, σ the residual's standard deviation about a slope's line.
        errors: of honest residuals.
        rows: routed rows: terms in a sum over them.
    """

    label: str
    base: Tensor
    lora: Tensor | None
    residual: Tensor
    weight: Tensor
    errors: Sequence[OwnDraws | Inherited]
    rows: int

    def slopes(self) -> Tensor:
        """Slopes by column tile, then of all columns, with variances: fp64 [2, T+1, 3], NaN where nothing fits.

        Weighted least squares: a slope is Σ a·residual, a = α·base + β·LoRA.
        """
        base, residual = self.base, self.residual
        lora = torch.zeros_like(base) if self.lora is None else self.lora
        products = ((base, base), (base, lora), (lora, lora), (base, residual), (lora, residual))
        bb, bl, ll, bq, lq = tiled(torch.stack([(a * b).sum(0) for a, b in products]))
        determinant = bb * ll - bl.square()
        determinant = torch.where(determinant > SINGULAR * bb * ll, determinant, torch.nan)
        total = bb + 2 * bl + ll
        both = 1 / torch.where(total > 0, total, torch.nan)
        α = torch.stack((ll / determinant, -bl / determinant, both))
        β = torch.stack((-bl / determinant, bb / determinant, both))
        at_once = 3 if base.numel() <= _SMALL else 1
        parts = zip(torch.split(α, at_once), torch.split(β, at_once), strict=True)
        variances = [self._variance(*each, lora) for each in parts]
        return torch.stack((α * bq + β * lq, torch.cat(variances))).movedim(1, 2)

    def _variance(self, α: Tensor, β: Tensor, lora: Tensor) -> Tensor:
        """Variances of slopes [n, T+1], by column tile, then of all columns."""
        columns = self.base.shape[1]
        of_tiles, of_all = (x[:, :-1].repeat_interleave(TILE, 1)[:, :columns] for x in (α, β)), (α[:, -1:], β[:, -1:])
        tiles, together = (self.weight * (a[:, None] * self.base + b[:, None] * lora) for a, b in (of_tiles, of_all))
        return torch.stack([each.variance(tiles, together) for each in self.errors]).sum(0)


@dataclass(frozen=True)
class _Residual:
    """What an output is off by, times `weight`, and its deviation, in the output's layout."""

    value: Tensor
    weight: Tensor
    deviation: Tensor

    def part(self, index: slice | Tensor) -> _Residual:
        return _Residual(self.value[index], self.weight[index], self.deviation[index])


def groups(tensor: str, got: Tensor, expected: Expectation) -> Iterator[Group]:
    """Each expert's part of an output, then the whole; none without a routed row."""
    residual = _residual(tensor, got, expected)
    return (_parameter_groups if tensor in ("dA", "dB") else _row_groups)(tensor, expected, residual)


def _residual(tensor: str, got: Tensor, expected: Expectation) -> _Residual:
    interval, problem = expected.accepted[tensor], expected.sample.problem
    assert interval.radius is not None
    dtype = got.dtype if got.dtype in (torch.bfloat16, torch.float16) else torch.float32
    rounding = _rounding(problem, tensor, expected.points)
    variance = residual_variance(ulp(interval.exact, dtype), interval.radius, rounding)
    if tensor == "dB":
        variance += torch.as_tensor(shared_by_ranks(expected)).square()
    variance *= copies(_unrounded(tensor, expected))
    sigma = (variance + _rows_rounding(tensor, expected)).sqrt()
    usable = bounded(interval, got.dtype) & torch.isfinite(got) & torch.isfinite(sigma)
    # Held against the rounded reference: a sum that hardly leaves the grid (a bias and next to nothing, equal rows
    # under gates whose sum is 1) rounds back every time, and that is no slope of the candidate's.
    nearest = interval.exact.float().double() if dtype == torch.float32 else round_to(interval.exact, dtype)
    of_usable = ((got.double() - nearest) / sigma, 1 / sigma, variance.sqrt())
    return _Residual(*(torch.where(usable, x, 0.0) for x in of_usable))


def bounded(interval: Interval, dtype: torch.dtype) -> Tensor:
    """Where every accepted value of a result stored in `dtype` is finite.

    What may round to infinity has no measurable error; leaving out only what did would pull the mean down.
    """
    ends = stored(interval, dtype)
    return torch.isfinite(interval.exact) & torch.isfinite(ends.low) & torch.isfinite(ends.high)


def _rounding(problem: Problem, tensor: str, points: RoundingPoints) -> Tensor | float:
    """Variance of the output's rounding: dX over slots sums rounded values, dA and dB may sum few terms."""
    if tensor not in ("dA", "dB"):
        return ON_A_GRID if tensor == "dX" and sums_rounded_rows(tensor, problem, points) else UNIFORM
    rows = torch.diff(problem.expert_offsets, prepend=problem.expert_offsets.new_zeros(1))
    by_expert = torch.where(rows <= FEW, ANY, UNIFORM).double().repeat_interleave(problem.rank)
    return by_expert[:, None] if tensor == "dA" else by_expert


def _unrounded(tensor: str, expected: Expectation) -> Tensor:
    """An output's exact values without the rounding of the rows that are summed up in it.

    Rounded to 16 bits, values become equal by chance, their errors unrelated; these tell copies apart.
    """
    if tensor == "dX":
        return _summed(tensor, expected, expected.bwd.d.exact)
    if tensor == "Y" and expected.sample.problem.gates is not None:
        return _summed(tensor, expected, expert_order_gates(expected.sample.problem)[:, None] * expected.fwd.y.exact)
    return expected.accepted[tensor].exact


def _rows_rounding(tensor: str, expected: Expectation) -> Tensor | float:
    """Variance of the rounding of the rows that an output sums; 0 without.

    Everyone's rows round alike: it is no error of the output's. But a wrong row shows only as it rounds otherwise, by a
    whole spacing or not at all: a sum in which rows cancel says no more than others.
    """
    problem = expected.sample.problem
    if not sums_rounded_rows(tensor, problem, expected.points):
        return 0.0
    rows, gates = (expected.bwd.d, 1.0) if tensor == "dX" else (expected.fwd.y, expert_order_gates(problem)[:, None])
    return _summed(tensor, expected, UNIFORM * (gates * ulp(rows.exact, problem.dtype)).square())


def _summed(tensor: str, expected: Expectation, rows: Tensor) -> Tensor:
    """Rows of Y or D [P, C], in expert order, summed to rows of the output."""
    total = torch.zeros_like(expected.accepted[tensor].exact)
    return total.index_add_(0, _targets(tensor, expected.sample.problem), rows)


def _parameter_groups(tensor: str, expected: Expectation, residual: _Residual) -> Iterator[Group]:
    """dA [E·r, K] and dB, turned to [E·r, N], by expert: one term only."""
    exact, problem = expected.accepted[tensor].exact, expected.sample.problem
    if tensor == "dB":
        exact, residual = exact.T, _Residual(residual.value.T, residual.weight.T, residual.deviation.T)
    scaled = torch.where(residual.weight > 0, exact * residual.weight, 0.0)
    sources, r, most, every = Sources(tensor, expected), problem.rank, 0, list[Inherited]()
    for e, start, end in problem.segments():
        own, rows = slice(e * r, (e + 1) * r), torch.arange(r, device=scaled.device)
        inherited = list(sources.draws(e, start, end, rows))
        yield _group(f"expert {e}", (scaled[own], None), residual.part(own), inherited, end - start)
        every += [replace(each, rows=each.rows + e * r) for each in inherited]
        most = max(most, end - start)
    if most:
        yield _group("all experts", (scaled, None), residual, every, most)


def _row_groups(tensor: str, expected: Expectation, residual: _Residual) -> Iterator[Group]:
    """Y and dX by expert: its share of each row, then all shares together."""
    problem = expected.sample.problem
    base, lora = _terms(tensor, expected)
    sources, target, segments = Sources(tensor, expected), _targets(tensor, problem), problem.segments()
    experts = [(f"expert {e}", [(e, start, end)]) for e, start, end in segments]
    for label, parts in [*experts, *([("all experts", segments)] if segments else [])]:
        rows = torch.cat([torch.arange(start, end, device=base.device) for _, start, end in parts])
        into, slot = torch.unique(target[rows], return_inverse=True)
        part = residual.part(into)

        def share(term: Tensor, rows: Tensor = rows, slot: Tensor = slot, weight: Tensor = part.weight) -> Tensor:
            summed = torch.zeros_like(weight).index_add_(0, slot, term[rows])
            return torch.where(weight > 0, summed * weight, 0.0)

        own = slot.split([end - start for _, start, end in parts])
        inherited = [each for of, at in zip(parts, own, strict=True) for each in sources.draws(*of, at)]
        yield _group(label, (share(base), None if lora is None else share(lora)), part, inherited, rows.numel())


def _terms(tensor: str, expected: Expectation) -> tuple[Tensor, Tensor | None]:
    """The base term, with its bias, and LoRA's in rows of Y, times their gates, or of D: [P, C] in expert order."""
    problem, x, dy = expected.problem, expert_order_inputs(expected.problem), expected.bwd.dy.value
    whole = expected.fwd.y.exact if tensor == "Y" else expected.bwd.d.exact
    base = torch.zeros_like(whole)
    for e, start, end in problem.segments():
        own, W = slice(start, end), problem.expert_weight(e)
        base[own] = x[own] @ W if tensor == "Y" else dy[own] @ W.T
        if tensor == "Y" and problem.expert_biases is not None:
            base[own] += problem.expert_biases[e].detach().double()
    lora = whole - base if problem.rank else None
    if tensor == "Y" and problem.gates is not None:
        gates = expert_order_gates(problem)[:, None]
        base, lora = gates * base, None if lora is None else gates * lora
    return base, lora


def _targets(tensor: str, problem: Problem) -> Tensor:
    """Row of Y or dX of each routed row, in expert order: int64 [P]."""
    positions = problem.row_positions()
    if tensor == "dX":
        return problem.row_sources()
    if problem.gates is not None:
        return positions // problem.gates.shape[1]
    return torch.arange(problem.P, device=problem.device) if problem.grouped_out else positions


def _group(
    label: str, terms: tuple[Tensor, Tensor | None], residual: _Residual, inherited: list[Inherited], rows: int
) -> Group:
    errors = [OwnDraws(residual.deviation), *inherited]
    return Group(label, *terms, residual.value, residual.weight, errors, rows)
