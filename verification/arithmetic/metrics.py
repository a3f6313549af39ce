"""A result's distance from the truth in its own units; thresholds are in `bounds`."""

from __future__ import annotations

import torch
from torch import Tensor

from mxref.rounding import min_exponent, precision_bits

_EXPONENT_FIELD = 0x7FF0_0000_0000_0000


def pow2_floor(x: Tensor) -> Tensor:
    """2^⌊log2 |x|⌋ from the exponent bits: fp64 -> fp64.

    Zero and fp64 subnormals give 0; ±inf and NaN give inf.
    """
    return (x.contiguous().view(torch.int64) & _EXPONENT_FIELD).view(torch.float64)


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of `dtype`'s numbers at |x|: 2^(⌊log2 |x|⌋ − p + 1), p significant bits, not below the subnormal spacing.

    As `numpy.spacing`: the distance from a representable x to the next one away from zero. Beyond the largest finite
    number it stays at that number's spacing.

    Args:
        x: fp64, any shape.
        dtype: bf16, fp16, fp32 or fp64.

    Returns:
        fp64, the shape of `x`; NaN where `x` is NaN.
    """
    lowest = 2.0 ** min_exponent(dtype)
    highest = 2.0 ** (-min_exponent(dtype) + 1)  # the largest exponent of every IEEE format is 1 − the smallest
    binade = pow2_floor(x).clamp(lowest, highest)
    return torch.where(torch.isnan(x), torch.nan, binade * 2.0 ** (1 - precision_bits(dtype)))


def ulp_error(got: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Signed error in `dtype`'s spacing at the exact value: (got − exact) / ulp(exact).

    Correct rounding is within ±0.5. Equal infinities and a NaN for a NaN are no error; a NaN or an infinity on one side
    alone is an infinite one.

    Args:
        got: any floating dtype.
        exact: fp64, the same shape.
        dtype: normally that of `got`.

    Returns:
        fp64, the same shape.
    """
    value = got.double()
    both_finite = torch.isfinite(value) & torch.isfinite(exact)
    same = (value == exact) | (torch.isnan(value) & torch.isnan(exact))
    error = (value - exact) / ulp(exact, dtype)
    return torch.where(both_finite, error, torch.where(same, 0.0, torch.inf))


def rms(x: Tensor) -> float:
    """Root mean square; 0 for no elements."""
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def ratio_statistics(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of got / exact where that is finite; (1, 0) where nowhere.

    A spread alone says little: a uniform factor of two or dropped rows have none.
    """
    ratios = got.double() / exact
    ratios = ratios[torch.isfinite(ratios)]
    if not ratios.numel():
        return 1.0, 0.0
    return float(ratios.mean()), float(ratios.std(correction=0))
