"""Thresholds of the statistical and behavioural guards, with derivations; intervals are in `bounds`.

Drift is a mean relative error: rounding errors average out over a stratum, a wrong factor does not. A fitted slope β
with standard error SE fails if |β| > z·SE + b. SE and z come from honest arithmetic's random errors, b from its
directed ones.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from mxref.rounding import precision_bits
from mxref.verification.arithmetic.accumulation import Accumulation

ALPHA = 1e-5
"""Probability that a whole run of honest arithmetic shows drift anywhere, all strata of all its cases together."""

TILE = 64
"""Columns of a stratum: two MX blocks, and no wider than any kernel's own tile, so that a bad tile fills a stratum."""

SINGULAR = 2.0**-30
"""A joint fit is skipped where 1 − cos² between its two terms is below this: the fp64 sums behind it, of 2^20 terms
with an error of 2^-53 each, would no longer determine the slopes."""

NAMED = 2.0**-7
"""A fitted factor this near to 0, −1 or a power of two is called by that name; it decides nothing."""

RUNS = 10
"""Runs that must agree by bits: a race that shows in every third run stays hidden in 0.67^9, 3 % of such tests."""

RUNS_INTERPRETED = 3
"""The same under the interpreter, which runs one program after the other: nothing can race, only memory can differ."""

GROWTH = 2.0**-16
"""What an error must exceed a baseline's by to be worse: in ulp, or relative to an error above 1 ulp.

The fp64 reference of 2^13 terms summed in another order, as a CPU does, moves by 2^13·2^-53 of their sizes, which is
2^-16 ulp of fp32; where its terms cancel the error itself is as much larger."""


def critical_z(strata: int, alpha: float = ALPHA) -> float:
    """Two-sided quantile Φ⁻¹(1 − α/2G) for G slopes judged in one run (Bonferroni: whatever their dependence).

    Sums of bounded uniform errors have lighter tails than the normal law: α is kept.
    """
    return NormalDist().inv_cdf(1 - alpha / (2 * max(1, strata)))


UNIFORM, ON_A_GRID, ANY = 1 / 12, 1 / 8, 1 / 4
"""Variance of one rounding in units of the output's spacing h squared, by what is rounded.

UNIFORM: a sum of many products; the error is uniform in ±h/2.
ON_A_GRID: a sum of values that lie on a grid of spacing h/m. The error takes m values only, ties among them:
    (1 + 2/m²)/12 for even m, 1/8 for m = 2 (and 0 for m = 1).
ANY: FEW products or less. Their error follows from a few mantissas, over and over in an outer product; what is left is
    that it is at most h/2.
"""

FEW = 3


def residual_variance(ulp: Tensor, radius: Tensor, rounding: Tensor | float = UNIFORM) -> Tensor:
    """Largest honest variance of an output's residual, of rounding and accumulation; fp64, elementwise.

    Args:
        ulp: h, spacing of the output's format at each element.
        radius: of the accumulator, at least its standard deviation.
        rounding: variance of the rounding in units of h², one of UNIFORM, ON_A_GRID, ANY for each element.
    """
    return ulp.square() * rounding + radius.square()


def copies(exact: Tensor) -> Tensor:
    """How many elements have each element's value up to its sign and a power of two; fp64, elementwise.

    They come from the same operands (repeated rows, an operand expanded from one column) and have the same relative
    error: n of them are one draw and, with n times the variance each, weigh as one. Values are equal up to 2^-40: fp64
    sums of the same terms in another order.
    """
    mantissa: Tensor = torch.frexp(exact).mantissa.abs()
    _, which, count = torch.unique((mantissa * 2.0**40).round(), return_inverse=True, return_counts=True)
    repeats: Tensor = count[which].double()
    return repeats


def rounding_pull(dtype: torch.dtype) -> float:
    """Largest slope of rounding to `dtype` alone: 2^-2p / 3 for p significant bits; 0 for fp32.

    Where a density f falls, more values round away from its peak than towards it: the mean error in a cell of width h
    is −h²/12·f'/f, for a normal law +h²/12·y/σ² (Sheppard's correction). Weighted by 1/h², the slope is E[y²/σ²] /
    (12·E[y²/h²]), and |y|/h ≥ 2^(p−1).
    """
    return 2.0 ** (-2 * precision_bits(dtype)) / 3 if dtype in (torch.bfloat16, torch.float16) else 0.0


def directed_loss(
    how: Accumulation, dtype: torch.dtype, terms: int, resident: bool = False, one_sign: float = 0.0
) -> float:
    """Largest slope of truncation in a sum of `terms` products; 0 for accumulators that round to nearest.

    A truncated step loses at most 2^-24·|S_t|, half an ulp of fp32, on average, towards zero. Before, each of its
    products is cut at `fraction_bits` below the sum, and loses half of the last of them: towards zero too, so that
    losses of products of either sign cancel, but for the share `one_sign` by which one sign prevails. What grows evenly
    over T steps is t/T of itself at step t: (T + 1)/2 such losses; what was there before (`resident`) has T. An
    undeclared sum of 16-bit operands may be any tensor core's: steps of 8.
    """
    if how.kind == "fp32_blocks" or (how.kind == "undeclared" and dtype not in (torch.bfloat16, torch.float16)):
        return 0.0
    step, bits = (how.step, how.fraction_bits) if how.kind == "tensor_core" else (8, 24)
    steps = math.ceil(terms / step)
    return (steps * 2.0**-24 if resident else (steps + 1) * 2.0**-25) * (1 + one_sign * step * 2.0 ** (23 - bits))
