"""E2M1 and E8M0 as data: the two number formats of MXFP4 and the bytes that hold them.

Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.3.3 (FP4 E2M1), 5.4.1 (E8M0) and 6.3 (conversion
to MX). A block is 32 consecutive elements along the last axis that share one E8M0 scale; two E2M1 codes fill one byte,
the element with the even index in the low nibble.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from mxref.rounding import power_of_two, round_to

__all__ = [
    "E2M1_VALUES",
    "E8M0_BIAS",
    "E8M0_NAN",
    "MX_BLOCK_SIZE",
    "SCALE_MODES",
    "decode_blocks",
    "decode_scales",
    "encode_blocks",
    "fp4_codebook",
    "pack_codes",
    "unpack_codes",
]

MX_BLOCK_SIZE = 32
E8M0_BIAS = 127
E8M0_NAN = 255
E2M1_MAX_EXPONENT = 2
"""Exponent of the largest E2M1 number, 6 = 1.5 · 2^2 (`emax` in the specification)."""

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES = _MAGNITUDES + tuple(-m for m in _MAGNITUDES)
"""The value of each code; bit 3 is the sign, so code 8 is −0."""

# Halfway points between neighbouring magnitudes, and the code that wins the tie: the one with an even mantissa bit.
_TIES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
_TIE_GOES_UP = torch.tensor([False, True, False, True, False, True, False])

SCALE_MODES = ("floor", "rceil", "ceil", "even")


@cache
def _codebook(device: torch.device) -> Tensor:
    return torch.tensor(E2M1_VALUES, dtype=torch.float32, device=device)


def fp4_codebook(device: torch.device | str) -> Tensor:
    """The 16 E2M1 values in code order: fp32 [16] on `device`, cached per device."""
    return _codebook(torch.device(device))


def pack_codes(codes: Tensor) -> Tensor:
    """Two E2M1 codes to a byte: uint8 [..., K] -> uint8 [..., K/2], element 2j in the low nibble of byte j.

    Raises:
        TypeError: `codes` is not uint8.
        ValueError: the last axis is odd, or a code is above 15.
    """
    _require_uint8("codes", codes)
    if codes.shape[-1] % 2:
        raise ValueError(f"codes has {codes.shape[-1]} elements on its last axis; packing needs an even number")
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"codes holds {int(codes.max())}; an E2M1 code lies in 0..15")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_codes(packed: Tensor) -> Tensor:
    """The inverse of `pack_codes`: uint8 [..., K/2] -> uint8 [..., K].

    Raises:
        TypeError: `packed` is not uint8.
    """
    _require_uint8("packed", packed)
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def decode_scales(scales: Tensor) -> Tensor:
    """E8M0 bytes to fp64, exactly: byte b is 2^(b−127), byte 0 is 2^−127 (not zero), byte 255 is NaN.

    Raises:
        TypeError: `scales` is not uint8.
    """
    _require_uint8("scales", scales)
    values = power_of_two(scales.to(torch.int64) - E8M0_BIAS)
    return torch.where(scales == E8M0_NAN, torch.nan, values)


def decode_blocks(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode MXFP4 elements: the exact product of code and scale, rounded once to `dtype`.

    Args:
        codes: uint8 [..., K], E2M1 codes 0..15.
        scales: uint8 [..., K/32], E8M0 bytes.
        dtype: fp64, fp32, bf16 or fp16; magnitudes beyond its range become ±inf.

    Returns:
        [..., K] of `dtype`. A block whose scale byte is 255 is NaN throughout; −0 keeps its sign.

    Raises:
        TypeError: `codes` or `scales` is not uint8, or `dtype` is not one of the four.
        ValueError: the shapes do not fit each other.
    """
    _require_uint8("codes", codes)
    blocks = _blocked("codes", codes)
    if scales.shape != blocks.shape[:-1]:
        raise ValueError(
            f"scales has shape {tuple(scales.shape)}; codes of shape {tuple(codes.shape)} need one scale a block of "
            f"{MX_BLOCK_SIZE}: {tuple(blocks.shape[:-1])}"
        )
    elements = fp4_codebook(codes.device).double()[blocks.long()]
    exact = elements * decode_scales(scales)[..., None]
    return round_to(exact.flatten(-2), dtype).to(dtype)


def encode_blocks(w: Tensor, scale_mode: str = "floor") -> tuple[Tensor, Tensor]:
    """Quantise to MXFP4: one E8M0 scale a block from its largest magnitude, elements to nearest, ties to even.

    The scale's exponent comes from the bits of the largest magnitude `amax` = m · 2^e (1 ≤ m < 2), never from a
    logarithm, so it is exact next to powers of two:

    - ``floor``: e − 2, the specification's conversion (section 6.3); magnitudes above 6 · scale saturate.
    - ``ceil``: e − 2, or e − 1 where m > 1, that is ⌈log2 amax⌉ − 2.
    - ``even``: amax is first rounded to E2M1's one mantissa bit (half up, as in Quark and torchao), then floor.
    - ``rceil``: ⌈log2(amax / 6)⌉, the smallest scale at which nothing saturates.

    Args:
        w: floating point [..., K], K a multiple of 32.
        scale_mode: one of the four names above.

    Returns:
        codes uint8 [..., K] and scales uint8 [..., K/32]. A block of zeros gets scale byte 0. A block that holds NaN or
        ±inf gets byte 255, NaN, and code 0 throughout: MXFP4 has no infinities, and a number would hide it.

    Raises:
        TypeError: `w` is not floating point.
        ValueError: K is no multiple of 32, or `scale_mode` is unknown.
    """
    if not w.is_floating_point():
        raise TypeError(f"w is {w.dtype}; encoding needs a floating-point tensor")
    if scale_mode not in SCALE_MODES:
        raise ValueError(f"scale_mode is {scale_mode!r}; expected one of {', '.join(SCALE_MODES)}")
    blocks = _blocked("w", w).double()
    amax = blocks.abs().amax(dim=-1)
    valid = torch.isfinite(amax)
    exponent = _scale_exponent(torch.where(valid, amax, 0.0), scale_mode)
    scales = torch.where(valid, exponent + E8M0_BIAS, E8M0_NAN).to(torch.uint8)
    scaled = torch.where(valid[..., None], blocks * power_of_two(-exponent)[..., None], 0.0)
    return _nearest_codes(scaled).flatten(-2), scales


def _scale_exponent(amax: Tensor, scale_mode: str) -> Tensor:
    """The shared exponent, an integer in −127..127, for finite fp64 `amax` ≥ 0."""
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa · 2^exponent, mantissa in [0.5, 1)
    exponent = exponent.to(torch.int64) - 1 - E2M1_MAX_EXPONENT
    if scale_mode == "ceil":
        exponent += mantissa > 0.5
    elif scale_mode == "even":
        exponent += mantissa >= 0.875  # 1.75 = the midpoint of 1.5 and 2
    elif scale_mode == "rceil":
        exponent += mantissa > 0.75  # 6 = 0.75 · 2^3
    return torch.where(amax == 0, -E8M0_BIAS, exponent.clamp(-E8M0_BIAS, E8M0_BIAS))


def _nearest_codes(x: Tensor) -> Tensor:
    """The E2M1 codes nearest to fp64 `x`, ties to the even mantissa, saturating at ±6; the sign of zero is kept."""
    magnitude = x.abs()
    ties, tie_goes_up = _TIES.to(x.device), _TIE_GOES_UP.to(x.device)
    above = torch.bucketize(magnitude, ties)  # ties strictly below the magnitude
    on_tie = magnitude[..., None] == ties
    codes = above + (on_tie & tie_goes_up).any(dim=-1)
    return (codes | (torch.signbit(x).long() << 3)).to(torch.uint8)


def _blocked(name: str, x: Tensor) -> Tensor:
    """[..., K] -> [..., K/32, 32]."""
    if x.ndim == 0 or x.shape[-1] % MX_BLOCK_SIZE:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; its last axis must be a multiple of the block size {MX_BLOCK_SIZE}"
        )
    return x.reshape(*x.shape[:-1], x.shape[-1] // MX_BLOCK_SIZE, MX_BLOCK_SIZE)


def _require_uint8(name: str, x: Tensor) -> None:
    if x.dtype != torch.uint8:
        raise TypeError(f"{name} is {x.dtype}; expected torch.uint8 (raw bytes)")
