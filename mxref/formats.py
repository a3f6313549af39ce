"""MXFP4 as data, and the bytes that hold it: E2M1 elements, E8M0 scales, blocks.

Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.3.3 (FP4 E2M1), 5.4.1 (E8M0) and 6.3 (conversion
to MX). A block is 32 consecutive elements along the last axis that share one E8M0 scale; two E2M1 codes fill one byte,
the element with the even index in the low nibble.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mxref.rounding import power_of_two, round_to

__all__ = [
    "E2M1",
    "E2M1_VALUES",
    "E8M0",
    "E8M0_BIAS",
    "E8M0_NAN",
    "MXFP4",
    "MX_BLOCK_SIZE",
    "SCALE_MODES",
    "ElementType",
    "Format",
    "ScaleType",
    "decode_blocks",
    "decode_scales",
    "encode_blocks",
    "fp4_codebook",
    "pack_codes",
    "unpack_codes",
]


@dataclass(frozen=True)
class ElementType:
    """What one code means: a sign bit above the index of a magnitude.

    Attributes:
        name: the specification's.
        bits: of a code.
        magnitudes: the value of each code without its sign, ascending.
        max_exponent: e of the largest magnitude m · 2^e, 1 ≤ m < 2 (`emax` in the specification).
    """

    name: str
    bits: int
    magnitudes: tuple[float, ...]
    max_exponent: int

    @property
    def sign(self) -> int:
        """The sign bit; the code that holds it alone is −0."""
        return 1 << (self.bits - 1)

    @property
    def values(self) -> tuple[float, ...]:
        """The value of each code."""
        return self.magnitudes + tuple(-m for m in self.magnitudes)


@dataclass(frozen=True)
class ScaleType:
    """What a scale byte b means: 2^(b − bias), except for one byte that is NaN."""

    name: str
    bias: int
    nan: int


@dataclass(frozen=True)
class Format:
    """A block format: codes of `element`, two to a byte, and one `scale` byte for `block_size` of them along K."""

    name: str
    element: ElementType
    scale: ScaleType
    block_size: int

    def packed_shape(self, E: int, N: int, K: int) -> tuple[int, int, int]:
        """The shape of the bytes that hold an expert stack's codes: [E, N, K/2]."""
        return E, N, K * self.element.bits // 8

    def scales_shape(self, E: int, N: int, K: int) -> tuple[int, int, int]:
        """The shape of its scale bytes: [E, N, K/block_size]."""
        return E, N, K // self.block_size


E2M1 = ElementType("E2M1", bits=4, magnitudes=(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), max_exponent=2)
E8M0 = ScaleType("E8M0", bias=127, nan=255)
MXFP4 = Format("MXFP4", E2M1, E8M0, block_size=32)

MX_BLOCK_SIZE = MXFP4.block_size
E2M1_VALUES = E2M1.values
E8M0_BIAS, E8M0_NAN = E8M0.bias, E8M0.nan

SCALE_MODES = ("floor", "rceil", "ceil", "even")

_codebooks: dict[torch.device, Tensor] = {}


def fp4_codebook(device: torch.device | str) -> Tensor:
    """The 16 E2M1 values in code order: fp32 [16] on `device`, cached per device."""
    device = torch.device(device)
    # Under FakeTensorMode no tensor is real: what is made there must not be kept, nor what is kept be used there.
    if type(torch.empty(0, device=device)) is not Tensor:
        return torch.tensor(E2M1_VALUES, dtype=torch.float32, device=device)
    if device not in _codebooks:
        with torch.inference_mode(False):  # an inference tensor would be refused by later calls with gradients
            _codebooks[device] = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=device)
    return _codebooks[device]


def pack_codes(codes: Tensor) -> Tensor:
    """Two E2M1 codes to a byte: uint8 [..., K] -> uint8 [..., K/2], element 2j in the low nibble of byte j.

    Raises:
        TypeError: `codes` is not uint8.
        ValueError: the last axis is odd, or a code is above 15.
    """
    _require_uint8("codes", codes)
    if codes.shape[-1] % 2:
        raise ValueError(f"codes has {codes.shape[-1]} elements on its last axis; packing needs an even number")
    largest = len(E2M1.values) - 1
    if codes.numel() and int(codes.max()) > largest:
        raise ValueError(f"codes holds {int(codes.max())}; an {E2M1.name} code lies in 0..{largest}")
    return codes[..., 0::2] | (codes[..., 1::2] << E2M1.bits)


def unpack_codes(packed: Tensor) -> Tensor:
    """The inverse of `pack_codes`: uint8 [..., K/2] -> uint8 [..., K].

    Raises:
        TypeError: `packed` is not uint8.
    """
    _require_uint8("packed", packed)
    return torch.stack((packed & (1 << E2M1.bits) - 1, packed >> E2M1.bits), dim=-1).flatten(-2)


def decode_scales(scales: Tensor) -> Tensor:
    """E8M0 bytes to fp64, exactly: byte b is 2^(b−127), byte 0 is 2^−127 (not zero), byte 255 is NaN.

    Raises:
        TypeError: `scales` is not uint8.
    """
    _require_uint8("scales", scales)
    values = power_of_two(scales.to(torch.int64) - E8M0.bias)
    return torch.where(scales == E8M0.nan, torch.nan, values)


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
    elements = torch.tensor(E2M1.values, dtype=torch.float64, device=codes.device)[blocks.long()]
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
    scales = torch.where(valid, exponent + E8M0.bias, E8M0.nan).to(torch.uint8)
    scaled = torch.where(valid[..., None], blocks * power_of_two(-exponent)[..., None], 0.0)
    return _nearest_codes(scaled).flatten(-2), scales


def _scale_exponent(amax: Tensor, scale_mode: str) -> Tensor:
    """The shared exponent, an integer in −127..127, for finite fp64 `amax` ≥ 0."""
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa · 2^exponent, mantissa in [0.5, 1)
    exponent = exponent.to(torch.int64) - 1 - E2M1.max_exponent
    if scale_mode == "ceil":
        exponent += mantissa > 0.5
    elif scale_mode == "even":
        exponent += mantissa >= 0.875  # 1.75 = the midpoint of 1.5 and 2
    elif scale_mode == "rceil":
        exponent += mantissa > 0.75  # 6 = 0.75 · 2^3
    return torch.where(amax == 0, -E8M0.bias, exponent.clamp(-E8M0.bias, E8M0.bias))


def _nearest_codes(x: Tensor) -> Tensor:
    """The E2M1 codes nearest to fp64 `x`, ties to the even mantissa, saturating at ±6; the sign of zero is kept."""
    magnitude = x.abs()
    # Halfway points between neighbours; of two neighbouring codes one is even, and its mantissa bit with it.
    ties = [(a + b) / 2 for a, b in pairwise(E2M1.magnitudes)]
    above = torch.bucketize(magnitude, x.new_tensor(ties))  # ties strictly below the magnitude
    on_tie_below_even = (magnitude[..., None] == x.new_tensor(ties[1::2])).any(dim=-1)
    codes = above + on_tie_below_even
    return (codes | (torch.signbit(x).long() * E2M1.sign)).to(torch.uint8)


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
