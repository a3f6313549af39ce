"""One correct rounding from fp64 to a narrower format.

torch converts fp64 to bf16 through fp32 and so rounds twice: 1 + 2^-8 + 2^-40 becomes 1.0 where the nearest bf16
is 1 + 2^-7. The golden model rounds here instead, once, on the fp64 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["min_exponent", "power_of_two", "precision_bits", "round_to"]

_EXPONENT = 0x7FF << 52
_PRECISION = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def precision_bits(dtype: torch.dtype) -> int:
    """Significant bits of a floating-point format, the hidden one included (bf16: 8, fp16: 11, fp32: 24).

    Raises:
        TypeError: `dtype` is none of fp64, fp32, fp16 and bf16.
    """
    if dtype not in _PRECISION:
        raise TypeError(f"dtype is {dtype}; expected one of {', '.join(map(str, _PRECISION))}")
    return _PRECISION[dtype]


def min_exponent(dtype: torch.dtype) -> int:
    """Exponent of the smallest positive normal number (bf16 and fp32: -126, fp16: -14)."""
    precision_bits(dtype)
    return -14 if dtype == torch.float16 else -1022 if dtype == torch.float64 else -126


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as fp64, built from its bits, so exact on every device.

    Args:
        exponent: integers in -1022..1023, any shape.
    """
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def round_to(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Round fp64 values to the grid of `dtype`: nearest, ties to even, subnormals kept, overflow to ±inf.

    Args:
        x: fp64, any shape.
        dtype: the target grid; None or fp64 leaves `x` as it is.

    Returns:
        fp64 of the same shape, every value representable in `dtype`; NaN, ±inf and −0 pass through.

    Raises:
        TypeError: `x` is not fp64, or `dtype` has no known grid.
    """
    if x.dtype != torch.float64:
        raise TypeError(f"x is {x.dtype}; round_to takes fp64, so that it is the only rounding")
    if dtype is None or dtype == torch.float64:
        return x
    if dtype == torch.float32:
        return x.float().double()  # one rounding in hardware
    shift, lowest, highest = 53 - precision_bits(dtype), min_exponent(dtype), 1 - min_exponent(dtype)
    # Beside 1.5 · 2^52 quanta of x's binade fp64 has no bit below the quantum: the sum is rounded there, ties to even.
    exponent = (x.view(torch.int64) & _EXPONENT).clamp(_biased(lowest), _biased(highest))
    large = (exponent + (shift << 52) + (1 << 51)).view(torch.float64)
    rounded = (x + large - large).to(dtype)  # exact, but that too large numbers become ±inf
    return torch.copysign(rounded.double(), x)


def _biased(exponent: int) -> int:
    return exponent + 1023 << 52
