"""The router of a step, in fp64, with what fp32 may make of it: gates by a softmax over a token's slots, and back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mxref.verification.arithmetic.accumulator import U, gamma
from mxref.verification.arithmetic.interval import Estimate

__all__ = ["Gates"]

_EXP = 4
"""Roundings that one exponential may err by: vendors' fp32 functions state 1 to 2 ulp, an ulp being at most 2u."""


@dataclass(frozen=True)
class Gates:
    """gates = softmax over slots of x·router[experts].

    Attributes:
        x: fp64 [M, K].
        router: fp64 [E, K].
        experts: [M, k], none of them a sentinel.
    """

    x: Tensor
    router: Tensor
    experts: Tensor

    @property
    def rows(self) -> Tensor:
        """The router's row of every slot: [M, k, K]."""
        return self.router[self.experts]

    @cached_property
    def logits(self) -> Tensor:
        """[M, k]."""
        return (self.rows * self.x[:, None]).sum(-1)

    @cached_property
    def gates(self) -> Tensor:
        """[M, k]."""
        return torch.softmax(self.logits, -1)

    @cached_property
    def relative_error(self) -> float:
        """Of any gate, at most: exponentials of logits that are known up to γ_K·|x||router|, their sum, a quotient.

        The reference's own rounding of its gates to fp32 is in it.
        """
        if not self.x.shape[0]:
            return 0.0
        K, slots = self.x.shape[1], self.experts.shape[1]
        logits = gamma(K) * (self.rows.abs() * self.x.abs()[:, None]).sum(-1)
        difference = 2 * logits.amax(-1) + U * (self.logits.amax(-1) - self.logits.amin(-1))
        return float(torch.expm1(2 * difference).max()) + gamma(2 * _EXP + slots + 3)

    def backward(self, dgates: Estimate) -> tuple[Estimate, tuple[Estimate, Tensor]]:
        """The gradient of x that comes through the router, and the router's with its terms' magnitudes.

        dlogit_j = g_j·(dg_j − Σ_i g_i·dg_i): what is subtracted is the gate's own term of a softmax.
        """
        g, error, slots = self.gates, self.relative_error, self.experts.shape[1]
        mean = (g * dgates.centre).sum(-1, keepdim=True)
        size = (g * dgates.reach).sum(-1, keepdim=True)
        mean_radius = (g * dgates.radius).sum(-1, keepdim=True) + (error + gamma(slots + 1)) * size
        inner, reach = dgates.centre - mean, dgates.reach + size
        inner_radius = dgates.radius + mean_radius + U * reach
        # A fused backward may subtract g_j·Σ from g_j·dg_j: the roundings are of the products, not of their difference.
        d = Estimate(g * inner, g * (inner_radius + (error + gamma(3)) * reach))
        terms, radii = d.reach[..., None] * self.x.abs()[:, None], d.radius[..., None] * self.x.abs()[:, None]
        n = d.centre.numel()
        magnitude, radius = self._of_experts(terms), self._of_experts(radii)
        of_router = Estimate(self._of_experts(d.centre[..., None] * self.x[:, None]), radius + gamma(n + 1) * magnitude)
        through = (d.radius + gamma(slots + 1) * d.reach)[..., None] * self.rows.abs()
        of_x = Estimate((d.centre[..., None] * self.rows).sum(1), through.sum(1))
        return of_x, (of_router, magnitude)

    def _of_experts(self, slots: Tensor) -> Tensor:
        """Slots' rows [M, k, K] added up by their expert: [E, K]."""
        return torch.zeros_like(self.router).index_add_(0, self.experts.flatten(), slots.flatten(0, 1))
