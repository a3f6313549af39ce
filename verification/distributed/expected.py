"""What a step must give, of the golden model on one process: exact values, or intervals for every element.

Intervals hold for fp32 in any order and any partition of the local sums, whichever rank takes which terms; what the sum
over ranks adds is derived for the dtype and order that the step declares (`reduction`). In 16 bits every
rounding point of the layer is one of the step's, wherever a token's rows are computed: `arithmetic.bounds` has each of
them. Where parts of a token's sum are rounded on several ranks and added in 16 bits, that is one more sum over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import frexp

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.rounding import round_to
from mxref.scattermoe import Backward, Forward, RoundingPoints, backward, expert_order_gates, forward
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS
from mxref.verification.arithmetic.accumulator import U, gamma
from mxref.verification.arithmetic.bounds import intervals
from mxref.verification.arithmetic.interval import Estimate, Interval, rho
from mxref.verification.distributed.fixtures import Fixture, absolute, problem_of, shared, updated
from mxref.verification.distributed.protocol import Batch, Declared, Model
from mxref.verification.distributed.reduction import Reduction
from mxref.verification.distributed.router import Gates

__all__ = ["LOCAL", "REDUCED", "Expected"]

LOCAL = ("Y", "dX", "dgates")
"""Results of each rank's own tokens."""
REDUCED = ("dA", "dB", "drouter")
"""Results that every rank has whole."""
_SCALINGS = gamma(3)
"""1/tokens is rounded, multiplied with, and that may happen to targets or to gradients."""


@dataclass(frozen=True)
class Expected:
    """What honest ranks answer to a fixture.

    Attributes:
        fixture: what was asked.
        shares: tokens of each rank of the group.
        declared: by the step.
    """

    fixture: Fixture
    shares: Sequence[int]
    declared: Declared

    @cached_property
    def steps(self) -> list[dict[str, Interval]]:
        """What is accepted of each step, whole, tokens in the order of ranks."""
        fixture = self.fixture
        if not fixture.case.exact:
            return [self._accepted(batch) for batch in fixture.batches]
        model, steps = fixture.model, []
        for batch in fixture.batches:
            values = _exact(model, batch, fixture.scale)
            steps.append({name: Interval(value, value, value) for name, value in values.items()})
            model = updated(model, values["dA"], values["dB"])
        return steps

    def _accepted(self, batch: Batch) -> dict[str, Interval]:
        model, scale = self.fixture.model, self.fixture.scale
        summed = len(self.shares) if self.declared.outputs == "summed" and len(self.shares) > 1 else 0
        whole = _estimates(model, batch, scale, summed)
        parts = [_estimates(model, part, scale, summed) for part in shared(batch, self.shares)]
        accepted = {}
        for name, (estimate, magnitude) in whole.items():
            centre, radius, dtype = estimate.centre, estimate.radius, None
            if name in LOCAL:
                dtype = RoundingPoints.contract(batch.x.dtype).dtype
            else:
                sums = self.declared.reduction if name in REDUCED else Reduction()  # the loss is summed in fp32
                radius = sums.radius(estimate, magnitude, [part[name][0] for part in parts])
            low, high = round_to(centre - radius, dtype), round_to(centre + radius, dtype)
            accepted[name] = Interval(low, high, centre, radius)
        return accepted


def _exact(model: Model, batch: Batch, scale: float) -> dict[str, Tensor]:
    """The results of a batch whose sums are all exact: fp64."""
    problem, dOut = problem_of(model, batch), batch.targets * scale
    points = RoundingPoints.contract(problem.dtype)
    fwd = forward(problem, points)
    bwd = backward(problem, fwd, dOut, points)
    found = {"Y": fwd.out, "dX": bwd.dx, "dgates": bwd.dgates, "dA": bwd.dA, "dB": bwd.dB}
    values = {name: point.value for name, point in found.items() if point is not None}
    return {"loss": scale * (fwd.out.value * batch.targets.double()).sum(), **values}


def _estimates(model: Model, batch: Batch, scale: float, summed: int) -> dict[str, tuple[Estimate, Tensor]]:
    """Each result of fp32 arithmetic in any order, and the sum of its terms' magnitudes: fp64.

    Results of a rank's own tokens are as before their last rounding. `summed`: ranks that each round a part of these
    and add the parts up; 0 where every token's slots meet in one place.
    """
    router = None if model.router is None else Gates(batch.x.double(), model.router.double(), batch.experts)
    problem = problem_of(model, batch, None if router is None else router.gates.float())
    dOut, points = batch.targets.double() * scale, RoundingPoints.contract(problem.dtype)
    assert points.dtype is None or (router is None and frexp(scale)[0] == 0.5)  # nothing is rounded on the way to dOut
    fwd = forward(problem, points)
    bwd = backward(problem, fwd, dOut, points)
    accepted = intervals(problem, fwd, bwd, dOut, points, ACCUMULATIONS["undeclared"])
    sizes = absolute(problem)
    fwd_sizes = forward(sizes, points)
    bwd_sizes = backward(sizes, fwd_sizes, dOut.abs(), points)
    assert bwd_sizes.dA is not None
    assert bwd_sizes.dB is not None
    assert bwd_sizes.dgates is not None
    magnitudes = {
        "Y": fwd_sizes.out.exact, "dX": bwd_sizes.dx.exact, "dgates": bwd_sizes.dgates.exact,
        "dA": bwd_sizes.dA.exact, "dB": bwd_sizes.dB.exact,
    }  # fmt: skip
    of_gates = 0.0 if router is None else router.relative_error
    scalings = _SCALINGS if points.dtype is None else 0.0
    found = {}
    for name, magnitude in magnitudes.items():
        interval = accepted[name]
        assert interval.radius is not None
        # Each term holds dOut once, but Y's, and the gate once, but dgates'.
        relative = (0.0 if name == "Y" else scalings) + (0.0 if name == "dgates" else of_gates)
        found[name] = Estimate(interval.exact, interval.radius + relative * magnitude), magnitude
    if summed:
        for name, terms in _slots(problem, fwd, bwd).items():
            estimate, magnitude = found[name]
            radius = Reduction(problem.dtype).radius(estimate, terms, [estimate] * summed)
            found[name] = Estimate(estimate.centre, radius), magnitude
    Y, magnitude = found["Y"]
    Y = Estimate(round_to(Y.centre, points.dtype), rho(Y.centre, Y.radius, points.dtype))
    found["loss"] = _loss(Y, magnitude, batch.targets.double(), scale)
    if router is not None:
        dgates, _ = found.pop("dgates")
        of_x, found["drouter"] = router.backward(dgates)
        dX, magnitude = found["dX"]
        total = Estimate(dX.centre + of_x.centre, dX.radius + of_x.radius + 2 * U * (dX.reach + of_x.reach))
        found["dX"] = total, magnitude
    return found


def _slots(problem: Problem, fwd: Forward, bwd: Backward) -> dict[str, Tensor]:
    """Σ|terms| of what is added up over a token's slots, each of them whole on one rank."""
    assert problem.gates is not None
    assert bwd.dgates is not None

    def over_slots(rows: Tensor) -> Tensor:
        by_position = torch.empty_like(rows)
        by_position[problem.row_positions()] = rows.abs()
        return by_position.view(-1, problem.k, rows.shape[1]).sum(1)

    gated = expert_order_gates(problem)[:, None] * fwd.y.value
    return {"Y": over_slots(gated), "dX": over_slots(bwd.d.value), "dgates": bwd.dgates.exact.abs()}


def _loss(Y: Estimate, magnitude: Tensor, targets: Tensor, scale: float) -> tuple[Estimate, Tensor]:
    """scale · ⟨Y, targets⟩, summed in any order."""
    terms = scale * (Y.reach * targets.abs()).sum()
    radius = scale * (Y.radius * targets.abs()).sum() + gamma(targets.numel() + 4) * terms
    return Estimate(scale * (Y.centre * targets).sum(), radius), scale * (magnitude * targets.abs()).sum()
