"""Errors that a slope inherits: Z, V and dY are rounded before the last product, and each reaches many elements of it.

An error of one of them is one draw. It moves a slope Σ a·residual by what it adds up to along its row, which the last
product says exactly: (a @ factorᵀ) · error. One value that occurs n times, of operands expanded from one column, has
one error n times over: n of them are one draw, see `copies`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mxref.scattermoe import expert_order_gates, expert_order_inputs
from mxref.verification.arithmetic.thresholds import TILE, copies
from mxref.verification.checks.expectation import Expectation


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
        """What they add to the variance of Σ a·residual by column tile, then of all columns: [T+1].

        Args:
            of_tiles, of_all: the a of the group's elements [R, C], for slopes of a tile each and for that of all.
        """
        columns = torch.nn.functional.pad
        C, pad = self.factor.shape[1], (0, -self.factor.shape[1] % TILE)
        shape = (-1, -(-C // TILE), TILE)
        tiles, factor = (columns(x, pad).view(shape).transpose(0, 1) for x in (of_tiles[self.rows], self.factor))
        moved = torch.cat((tiles @ factor.mT, (of_all[self.rows] @ self.factor.T)[None]))
        return (moved * self.deviation).square().sum((1, 2))


def draws(tensor: str, expected: Expectation, e: int, start: int, end: int, rows: Tensor) -> Iterator[Draws]:
    """The draws in one expert's part of Y, dX, dA or dBᵀ; `rows`: where in the group its routed rows, or ranks, are."""
    problem, own, bounds = expected.sample.problem, slice(start, end), expected.propagation
    if bounds.z is not None:
        A, B, s = bounds.adapters(e)
        of_z = s * (bounds.z.radius * copies(bounds.z.centre).sqrt())[own]
        if tensor == "Y":
            gates = 1.0 if problem.gates is None else expert_order_gates(problem)[own, None]
            yield Draws(rows, B.T, gates * of_z)
        if tensor == "dB":
            yield Draws(rows, expected.bwd.dy.value[own], of_z.T)
    if bounds.v is not None:
        of_v = s * (bounds.v.radius * copies(bounds.v.centre).sqrt())[own]
        if tensor == "dX":
            yield Draws(rows, A, of_v)
        if tensor == "dA":
            yield Draws(rows, expert_order_inputs(problem)[own], of_v.T)
    if tensor == "dX" and bounds.dy is not None and problem.gates is not None:
        of_dy = (bounds.dy.radius * copies(bounds.dy.centre).sqrt())[own]
        yield Draws(rows, problem.expert_weight(e).T, of_dy)


def shared_by_ranks(expected: Expectation) -> Tensor | float:
    """What dB inherits from dY, one draw for the r elements of a row, so √r times in each of them: [N, E·r]."""
    problem, bounds = expected.sample.problem, expected.propagation
    if bounds.dy is None or bounds.z is None or problem.gates is None:
        return 0.0
    found = expected.accepted["dB"].exact.new_zeros(problem.N, problem.E * problem.rank)
    for e, start, end in problem.segments():
        dy, z, own = bounds.dy[start:end], bounds.z[start:end], slice(e * problem.rank, (e + 1) * problem.rank)
        found[:, own] = problem.rank**0.5 * abs(problem.scaling) * (dy.radius.T @ z.reach)
    return found
