"""A quantity known up to a radius, and the interval that is accepted for an output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxref.rounding import round_to


@dataclass(frozen=True)
class Interval:
    """What is accepted for one output: low ≤ got ≤ high, elementwise; all fp64 in the caller's layout.

    exact: the reference before the output's own rounding. Where it is NaN or infinite the class decides, not the ends.
    radius: how far an honest implementation can be from `exact` before that rounding; None where equality is asked for.
    """

    low: Tensor
    high: Tensor
    exact: Tensor
    radius: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.low.shape == self.high.shape == self.exact.shape


def rho(q: Tensor, e: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Radius around R(q) that holds R(q + δ) for every |δ| ≤ e; e itself where R is the identity (dtype None)."""
    if dtype is None:
        return e
    centre = round_to(q, dtype)
    up, down = round_to(q + e, dtype) - centre, round_to(q - e, dtype) - centre
    return torch.maximum(up.abs(), down.abs())


@dataclass(frozen=True)
class Estimate:
    """A quantity known up to a radius: centre and radius, fp64, one shape."""

    centre: Tensor
    radius: Tensor

    @classmethod
    def zeros_like(cls, x: Tensor) -> Estimate:
        """Nothing yet, to be filled by `set`."""
        return cls(torch.zeros_like(x), torch.zeros_like(x))

    def set(self, index: slice, part: Estimate) -> None:
        """Fill in a part."""
        self.centre[index], self.radius[index] = part.centre, part.radius

    @property
    def reach(self) -> Tensor:
        """The largest magnitude that it may have."""
        return self.centre.abs() + self.radius

    def __getitem__(self, index: slice | Tensor) -> Estimate:
        return Estimate(self.centre[index], self.radius[index])
