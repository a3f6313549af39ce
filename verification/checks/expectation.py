"""The golden model's results for one sample under one declaration, computed once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.scattermoe import Backward, Forward, RoundingPoints, backward, forward
from mxref.verification.arithmetic.accumulation import Accumulation
from mxref.verification.arithmetic.bounds import Propagation
from mxref.verification.arithmetic.interval import Interval
from mxref.verification.arithmetic.thresholds import ALPHA, TILE, critical_z
from mxref.verification.cases.case import Case, Sample

T = TypeVar("T")
_AT_ONCE = 2**26
"""Elements of weights that are decoded before the reference's passes, not expert by expert in each."""


def slopes_of(case: Case) -> int:
    """The most slopes that the check for drift can fit to a case."""
    columns = {"Y": case.N, "dX": case.K} | ({"dA": case.K, "dB": case.N} if case.rank else {})
    per_stratum = {"Y": 3, "dX": 3, "dA": 1, "dB": 1} if case.rank else {"Y": 1, "dX": 1}
    return sum((case.experts + 1) * (-(-columns[t] // TILE) + 1) * per_stratum[t] for t in columns)


@dataclass(frozen=True)
class Expectation:
    """What an honest answer to `sample` can be.

    Attributes:
        points, how: declared rounding points and accumulation.
        slopes: of the whole run, `slopes_of` summed over its cases; None: of this case alone.
        alpha: probability that honest arithmetic shows drift in that run.
        asked_on: the candidate's device; None for the sample's, which is the reference's.
    """

    sample: Sample
    points: RoundingPoints
    how: Accumulation
    slopes: int | None = None
    alpha: float = ALPHA
    asked_on: torch.device | None = None

    @property
    def critical(self) -> float:
        """The |z| beyond which a slope is drift."""
        return critical_z(slopes_of(self.sample.case) if self.slopes is None else self.slopes, self.alpha)

    @property
    def device(self) -> torch.device:
        """The candidate's."""
        return self.asked_on or self.sample.problem.device

    @cached_property
    def problem(self) -> Problem:
        """The sample's, whose weights are decoded once; large ones, an expert at a time, whenever they are read."""
        problem = self.sample.problem
        return problem.decoded() if problem.E * problem.K * problem.N <= _AT_ONCE else problem

    @cached_property
    def fwd(self) -> Forward:
        """The reference's forward pass."""
        return forward(self.problem, self.points)

    @cached_property
    def bwd(self) -> Backward:
        """The reference's backward pass."""
        return backward(self.problem, self.fwd, self.sample.grad_out, self.points)

    @cached_property
    def accepted(self) -> dict[str, Interval]:
        """Accepted intervals of all tensors asked for."""
        return self._asked_for(self._bounds[1])

    @property
    def propagation(self) -> Propagation:
        """Errors propagated through the whole call."""
        return self._bounds[0]

    @cached_property
    def _bounds(self) -> tuple[Propagation, dict[str, Interval]]:
        dOut = self.sample.grad_out.detach().double()
        bounds = Propagation(self.problem, self.fwd, dOut, self.points, self.how)
        found = bounds.output()
        if self.sample.case.call.mode == "grad":
            found |= bounds.gradients(self.bwd)
        return bounds, found

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        """The results under the declared rounding points: fp64, of all tensors asked for."""
        fwd, bwd = self.fwd, self.bwd
        named = {
            "Y": fwd.out, "dX": bwd.dx, "dA": bwd.dA, "dB": bwd.dB, "dbias": bwd.dbias, "dgates": bwd.dgates
        }  # fmt: skip
        return self._asked_for({name: rounded.value for name, rounded in named.items() if rounded is not None})

    def _asked_for(self, tensors: dict[str, T]) -> dict[str, T]:
        wants = self.sample.case.call.wants
        return {name: tensor for name, tensor in tensors.items() if name == "Y" or wants(name)}
