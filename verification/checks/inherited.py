"""A slope's error: elements' own errors, and those that they inherit.

Z, V and dY are rounded before the last product, and each reaches many elements of it: its error is one draw, which
moves a slope Σ a·residual by (a @ factorᵀ) · error. Where rows of Y or D are rounded to 16 bits before they are summed,
such an error moves a few elements by a whole spacing and no others: then a row is one draw. n equal values of operands
expanded from one column are one draw, see `copies`, and so are n equal rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.scattermoe import Rounded, RoundingPoints, expert_order_gates
from mxref.verification.arithmetic.interval import Estimate
from mxref.verification.arithmetic.thresholds import TILE, copies
from mxref.verification.checks.expectation import Expectation


@dataclass(frozen=True)
class OwnDraws:
    """Errors of a group's elements, one draw each; deviation: upper bound of the standard deviations, [R, C]."""

    deviation: Tensor

    def variance(self, of_tiles: Tensor, of_all: Tensor) -> Tensor:
        """What they add to the variances of n slopes Σ a·residual by column tile, then of all columns: [n, T+1].

        Args:
            of_tiles, of_all: a of the group's elements [n, R, C], for slopes of tiles and of all.
        """
        tiles, together = (tiled((a * self.deviation).square()) for a in (of_tiles, of_all))
        return torch.cat((tiles[..., :-1], together[..., -1:]), -1).sum(1)


@dataclass(frozen=True)
class Draws:
    """Draws that reach whole rows of a group's elements.

    Attributes:
        rows: their rows in the group, [m].
        factor: what each draw is multiplied with, [n, C].
        deviation: at most their standard deviations, [m, n].
    """

    rows: Tensor
    factor: Tensor
    deviation: Tensor

    def variance(self, of_tiles: Tensor, of_all: Tensor) -> Tensor:
        """As `OwnDraws.variance`."""
        tiles, factor = (_by_tile(x).transpose(-2, -3) for x in (of_tiles[:, self.rows], self.factor))
        moved = torch.cat((tiles @ factor.mT, (of_all[:, self.rows] @ self.factor.T)[:, None]), 1)
        return (moved * self.deviation).square().sum((2, 3))


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
        tiles, together = (tiled(a[:, self.rows].abs() * self.deviation) for a in (of_tiles, of_all))
        return torch.cat((tiles[..., :-1], together[..., -1:]), -1).square().sum(1)


Inherited = Draws | RowDraws


def tiled(columns: Tensor) -> Tensor:
    """Sums over each tile of columns [..., C], then over all: [..., T+1]."""
    tiles = _by_tile(columns).sum(-1)
    return torch.cat((tiles, tiles.sum(-1, keepdim=True)), -1)


def _by_tile(x: Tensor) -> Tensor:
    """[..., C], zero-padded, as [..., T, TILE]."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % TILE)).view(*x.shape[:-1], -(-x.shape[-1] // TILE), TILE)


@dataclass(frozen=True)
class Sources:
    """Sources of the errors that elements of an output inherit."""

    tensor: str
    expected: Expectation

    def draws(self, e: int, start: int, end: int, rows: Tensor) -> Iterator[Inherited]:
        """The draws in one expert's part of Y, dX, dA or dBᵀ.

        Args:
            e, start, end: the expert, and its range of routed rows in expert order.
            rows: its routed rows, or ranks, in the group.
        """
        expected, own = self.expected, slice(start, end)
        problem, bounds = expected.problem, expected.propagation
        if sums_rounded_rows(self.tensor, problem, expected.points):
            if self._of_rows is not None:
                yield RowDraws(rows, self._of_rows[own])
            return
        if self.tensor == "Y" and self._of_z is not None:
            _, B, s = bounds.adapters(e)
            of_z = s * self._of_z[own]
            yield Draws(rows, _finite(B.T), of_z if self._gates is None else self._gates[own] * of_z)
        if self.tensor == "dB" and self._of_z is not None:
            yield Draws(rows, _finite(expected.bwd.dy.value[own]), problem.scaling * self._of_z[own].T)
        if self.tensor in ("dX", "dA") and self._of_v is not None:
            A, _, s = bounds.adapters(e)
            of_v = s * self._of_v[own]
            yield Draws(rows, _finite(A), of_v) if self.tensor == "dX" else Draws(rows, _finite(bounds.x[own]), of_v.T)
        if self.tensor == "dX" and self._of_dy is not None:
            yield Draws(rows, _finite(problem.expert_weight(e).T), self._of_dy[own])

    @cached_property
    def _of_rows(self) -> Tensor | None:
        """Of rows of Y, times their gates, or of D; n equal rows round alike."""
        bounds = self.expected.propagation
        if self._gates is not None and self.tensor == "Y":
            return _finite(self._gates.abs() * bounds.y.radius * _alike(self.expected.fwd.y.exact))
        return None if bounds.d is None else _finite(bounds.d.radius * _alike(self.expected.bwd.d.exact))

    @cached_property
    def _gates(self) -> Tensor | None:
        problem = self.expected.sample.problem
        return None if problem.gates is None else expert_order_gates(problem)[:, None]

    @cached_property
    def _of_z(self) -> Tensor | None:
        return _deviation(self.expected.propagation.z, self.expected.fwd.z)

    @cached_property
    def _of_v(self) -> Tensor | None:
        return _deviation(self.expected.propagation.v, self.expected.bwd.v)

    @cached_property
    def _of_dy(self) -> Tensor | None:
        return _deviation(self.expected.propagation.dy, self.expected.bwd.dy)


def _deviation(x: Estimate | None, value: Rounded | None) -> Tensor | None:
    """Upper bound of the standard deviation; n elements equal before rounding count as one draw."""
    return None if x is None or value is None else _finite(x.radius * copies(value.exact).sqrt())


def _alike(rows: Tensor) -> Tensor:
    """√n of each row that occurs n times: [R, 1]; rows are told apart by one weighted sum."""
    weights = torch.linspace(1, 2, rows.shape[1], dtype=torch.float64, device=rows.device)
    return copies(_finite(rows) @ weights).sqrt()[:, None]


def sums_rounded_rows(tensor: str, problem: Problem, points: RoundingPoints) -> bool:
    """Whether an output sums rows rounded to 16 bits: Y's over gates, or D's over an input row's slots."""
    if tensor == "dX":
        return points.dtype is not None and problem.k > 1 and not problem.grouped_in
    return tensor == "Y" and points.dtype is not None and problem.gates is not None and not points.gates_before_output


def _finite(x: Tensor) -> Tensor:
    """Without NaN and infinities, whose reach is not judged."""
    return torch.where(torch.isfinite(x), x, 0.0)


def shared_by_ranks(expected: Expectation) -> Tensor | float:
    """What dB inherits from dY, one draw for the r elements of a row, so √r times in each: [N, E·r]."""
    problem, bounds = expected.sample.problem, expected.propagation
    if bounds.dy is None or bounds.z is None:
        return 0.0
    found = expected.accepted["dB"].exact.new_zeros(problem.N, problem.E * problem.rank)
    for e, start, end in problem.segments():
        dy, z, own = bounds.dy[start:end], bounds.z[start:end], slice(e * problem.rank, (e + 1) * problem.rank)
        found[:, own] = problem.rank**0.5 * abs(problem.scaling) * (dy.radius.T @ z.reach)
    return found
