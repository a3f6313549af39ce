"""A quantity known up to a radius, and the interval that is accepted for an output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxref.rounding import round_to


@dataclass(frozen=True)
class Interval:
    """What is accepted for one output, elementwise: low ≤ got ≤ high; fp64 in the caller's layout.

    exact: the reference before the output's own rounding; where it is NaN or infinite the class decides.
    radius: the largest honest distance from `exact` before that rounding; None for equality.
    undecided: bool, elements for which every result is honest, see `may_overflow`; None for none.
    grid: the dtype that low and high are numbers of, if that is known.
    """

    low: Tensor
    high: Tensor
    exact: Tensor
    radius: Tensor | None = None
    undecided: Tensor | None = None
    grid: torch.dtype | None = None

    def __post_init__(self) -> None:
        assert self.low.shape == self.high.shape == self.exact.shape


def rho(q: Tensor, e: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Radius around R(q) that holds R(q + δ) for every |δ| ≤ e; e itself where R is the identity (dtype None)."""
    if dtype is None:
        return e
    centre = round_to(q, dtype)
    up, down = round_to(q + e, dtype) - centre, round_to(q - e, dtype) - centre
    return torch.maximum(up.abs(), down.abs())


def may_overflow(q: Tensor, e: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """Where R(q + δ), |δ| ≤ e, is finite for some δ and infinite for others, of a finite q; None for nowhere.

    Where R is the identity, fp32's range counts.
    """
    dtype, magnitude = dtype or torch.float32, q.abs()
    near = torch.isfinite(q) & (magnitude + e > torch.finfo(dtype).max)
    if not bool(near.any()):
        return None
    least, most = round_to((magnitude - e).clamp(min=0), dtype), round_to(magnitude + e, dtype)
    found = near & torch.isinf(most) & ~torch.isinf(least)
    return found if bool(found.any()) else None


@dataclass(frozen=True)
class Estimate:
    """Centre and radius, fp64, of one shape."""

    centre: Tensor
    radius: Tensor

    @classmethod
    def zeros_like(cls, x: Tensor) -> Estimate:
        """Zeros, to be filled by `set`."""
        return cls(torch.zeros_like(x), torch.zeros_like(x))

    def set(self, index: slice, part: Estimate) -> None:
        """Fill in a part."""
        self.centre[index], self.radius[index] = part.centre, part.radius

    @property
    def reach(self) -> Tensor:
        """The largest possible magnitude."""
        return self.centre.abs() + self.radius

    def __getitem__(self, index: slice | Tensor) -> Estimate:
        return Estimate(self.centre[index], self.radius[index])
