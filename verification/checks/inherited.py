"""What a slope's error is made of: elements' own errors, and those that they inherit.

Z, V and dY are rounded before the last product, and each reaches many elements of it. An error of one of them is one
draw. It moves a slope Σ a·residual by what it adds up to along its row, which the last product says exactly:
(a @ factorᵀ) · error. Where rows of Y or D are rounded to 16 bits before they are summed up, such an error moves a few
elements by a whole spacing and no other one at all: then a row is taken for one draw. A value that occurs n times, of
operands expanded from one column, has one error n times over: n are one draw, see `copies`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.scattermoe import Rounded, RoundingPoints, expert_order_gates, expert_order_inputs
from mxref.verification.arithmetic.interval import Estimate
from mxref.verification.arithmetic.thresholds import TILE, copies
from mxref.verification.checks.expectation import Expectation


@dataclass(frozen=True)
class OwnDraws:
    """Errors of a group's elements, one draw each; deviation: at most their standard deviations, [R, C]."""

    deviation: Tensor

    def variance(self, of_tiles: Tensor, of_all: Tensor) -> Tensor:
        """What they add to the variance of Σ a·residual by column tile, then of all columns: [T+1].

        Args:
            of_tiles, of_all: the a of the group's elements [R, C], for slopes of a tile each and for that of all.
        """
        tiles, together = (tiled((a * self.deviation).square()) for a in (of_tiles, of_all))
        return torch.cat((tiles[:, :-1], together[:, -1:]), 1).sum(0)


@dataclass(frozen=True)
class Draws:
    """Draws that reach whole rows of a group's elements.

    Attributes:
        rows: the group's rows [m] that they are in.
        factor: what each draw is multiplied with on its way, [n, C].
        deviation: at most their standard deviations, [m, n].
    """

    rows: Tensor
    factor: Tensor
    deviation: Tensor

    def variance(self, of_tiles: Tensor, of_all: Tensor) -> Tensor:
        """As `OwnDraws.variance`."""
        tiles, factor = (_by_tile(x).transpose(0, 1) for x in (of_tiles[self.rows], self.factor))
        moved = torch.cat((tiles @ factor.mT, (of_all[self.rows] @ self.factor.T)[None]))
        return (moved * self.deviation).square().sum((1, 2))


@dataclass(frozen=True)
class RowDraws:
    """Rows of a group's elements whose errors are one draw each.

    Attributes:
        rows: the group's rows [m] that they are in.
        deviation: at most their standard deviations, [m, C].
    """

    rows: Tensor
    deviation: Tensor

    def variance(self, of_tiles: Tensor, of_all: Tensor) -> Tensor:
        """As `OwnDraws.variance`."""
        tiles, together = (tiled(a[self.rows].abs() * self.deviation) for a in (of_tiles, of_all))
        return torch.cat((tiles[:, :-1], together[:, -1:]), 1).square().sum(0)


Inherited = Draws | RowDraws


def tiled(columns: Tensor) -> Tensor:
    """Sums over each tile of columns, then over all: [R, T+1]."""
    tiles = _by_tile(columns).sum(2)
    return torch.cat((tiles, tiles.sum(1, keepdim=True)), 1)


def _by_tile(x: Tensor) -> Tensor:
    """[R, C] with zeros behind, as [R, T, TILE]."""
    C = x.shape[1]
    return torch.nn.functional.pad(x, (0, -C % TILE)).view(x.shape[0], -(-C // TILE), TILE)


def draws(tensor: str, expected: Expectation, e: int, start: int, end: int, rows: Tensor) -> Iterator[Inherited]:
    """The draws in one expert's part of Y, dX, dA or dBᵀ; `rows`: where in the group its routed rows, or ranks, are."""
    problem, own, bounds = expected.sample.problem, slice(start, end), expected.propagation
    if sums_rounded_rows(tensor, problem, expected.points):
        if tensor == "Y":
            yield RowDraws(rows, _finite(expert_order_gates(problem)[own, None].abs() * bounds.y.radius[own]))
        elif bounds.d is not None:
            yield RowDraws(rows, _finite(bounds.d.radius[own]))
        return
    if bounds.z is not None and expected.fwd.z is not None:
        A, B, s = bounds.adapters(e)
        of_z = _deviation(bounds.z, expected.fwd.z)[own]
        if tensor == "Y":
            gates = 1.0 if problem.gates is None else expert_order_gates(problem)[own, None]
            yield Draws(rows, _finite(B.T), s * gates * of_z)
        if tensor == "dB":
            yield Draws(rows, _finite(expected.bwd.dy.value[own]), problem.scaling * of_z.T)
    if bounds.v is not None and expected.bwd.v is not None:
        of_v = s * _deviation(bounds.v, expected.bwd.v)[own]
        if tensor == "dX":
            yield Draws(rows, _finite(A), of_v)
        if tensor == "dA":
            yield Draws(rows, _finite(expert_order_inputs(problem)[own]), of_v.T)
    if tensor == "dX" and bounds.dy is not None:
        yield Draws(rows, _finite(problem.expert_weight(e).T), _deviation(bounds.dy, expected.bwd.dy)[own])


def _deviation(x: Estimate, value: Rounded) -> Tensor:
    """At most the standard deviation, where n equal elements count as one draw: equal before they were rounded."""
    return _finite(x.radius * copies(value.exact).sqrt())


def sums_rounded_rows(tensor: str, problem: Problem, points: RoundingPoints) -> bool:
    """Whether an output adds up rows that are rounded to 16 bits: Y's over gates, or D's over an input row's slots."""
    if tensor == "dX":
        return points.dtype is not None and problem.k > 1 and not problem.grouped_in
    return tensor == "Y" and points.dtype is not None and problem.gates is not None and not points.gates_before_output


def _finite(x: Tensor) -> Tensor:
    """Without what is NaN or infinite: no element that it reaches is judged."""
    return torch.where(torch.isfinite(x), x, 0.0)


def shared_by_ranks(expected: Expectation) -> Tensor | float:
    """What dB inherits from dY, one draw for the r elements of a row, so √r times in each of them: [N, E·r]."""
    problem, bounds = expected.sample.problem, expected.propagation
    if bounds.dy is None or bounds.z is None:
        return 0.0
    found = expected.accepted["dB"].exact.new_zeros(problem.N, problem.E * problem.rank)
    for e, start, end in problem.segments():
        dy, z, own = bounds.dy[start:end], bounds.z[start:end], slice(e * problem.rank, (e + 1) * problem.rank)
        found[:, own] = problem.rank**0.5 * abs(problem.scaling) * (dy.radius.T @ z.reach)
    return found
