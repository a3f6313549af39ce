"""How far exp and division in fp32 are from exact, and quantities that carry such errors along.

Sources: CUDA C++ Programming Guide, chapter on mathematical functions, and PTX ISA: `ex2.approx.f32` and
`div.full.f32` err by at most 2 ulp. Triton computes exp(x) as ex2.approx(x·log2 e), with one rounding of the product
and one of the constant; the guide gives for the same two instructions, `__expf`, 2 + ⌊1.173·|x|⌋ ulp, which is more.
NumPy's own exp in fp32 errs by at most 2.52 ulp (its source, `loops_exponent_log.dispatch.c.src`), its division rounds
once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxref.verification.arithmetic.accumulator import UNDERFLOW, U

__all__ = ["NUMPY", "NVIDIA", "Approximate", "Elementary", "elementary", "exp_of_minus", "reciprocal"]

_ULP = 2 * U
"""One ulp of fp32 relative to the number, at most."""

_FLUSHED = 2.0**-126
"""What may be lost where an exponential is subnormal: all of it."""


@dataclass(frozen=True)
class Elementary:
    """Relative errors of one implementation's fp32.

    Attributes:
        argument: of what is raised to, in exp(x): |x| times this is added to the exponent.
        exp: of the power itself.
        division: of a quotient.
    """

    argument: float
    exp: float
    division: float


NVIDIA = Elementary(argument=1.25 * U, exp=2.5 * _ULP, division=2.5 * _ULP)
"""log2 e is 2^−26.2 off in fp32; half an ulp is added in case that a distance is meant to the rounded result."""

NUMPY = Elementary(argument=0.0, exp=2.52 * _ULP, division=U)


def elementary(device: torch.device) -> Elementary:
    """What kernels compute with there: interpreted, NumPy."""
    return NUMPY if device.type == "cpu" else NVIDIA


@dataclass(frozen=True)
class Approximate:
    """An fp32 quantity: the exact value, fp64, and how far the computed one can be from it.

    Attributes:
        value, radius: of one shape; a radius counts only where the value is finite.
    """

    value: Tensor
    radius: Tensor

    @classmethod
    def exact(cls, value: Tensor) -> Approximate:
        """What is known without an error."""
        return cls(value, torch.zeros_like(value))

    def times(self, other: Approximate) -> Approximate:
        """The product, rounded once."""
        radius = self.value.abs() * other.radius + other.value.abs() * self.radius + self.radius * other.radius
        return _rounded(self.value * other.value, radius)

    def plus(self, other: Approximate) -> Approximate:
        """The sum, rounded once."""
        return _rounded(self.value + other.value, self.radius + other.radius)

    def where(self, condition: Tensor, other: Approximate) -> Approximate:
        """This where the condition holds, the other elsewhere."""
        return Approximate(
            torch.where(condition, self.value, other.value), torch.where(condition, self.radius, other.radius)
        )


def exp_of_minus(x: Approximate, how: Elementary) -> Approximate:
    """e^−|x|."""
    size = x.value.abs()
    off = x.radius + how.argument * (size + x.radius)
    value, largest = torch.exp(-size), torch.exp(-(size - off).clamp(min=0.0)) * (1 + how.exp)
    return Approximate(value, largest - value + _FLUSHED)


def reciprocal(x: Approximate, how: Elementary) -> Approximate:
    """1 / x, for x of at least 1."""
    value = 1 / x.value
    off = x.radius * value / (x.value - x.radius)
    return Approximate(value, off + how.division * (value + off))


def _rounded(value: Tensor, radius: Tensor) -> Approximate:
    return Approximate(value, radius + U * (value.abs() + radius) + UNDERFLOW)
