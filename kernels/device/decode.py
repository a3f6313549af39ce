"""MXFP4 decode inside a kernel: packed nibbles and E8M0 bytes to floating-point values, every case exact.

Both factors are built from bits; no `exp2`, no `ldexp`. A code's three magnitude bits, placed at fp32's low
exponent bits and top mantissa bit, read as value · 2^−126, whatever the code (0.5 becomes a subnormal). One
multiply by 2^126 yields the value, a second by the block's scale the weight. Neither rounds: the product of a
two-bit significand and a power of two in 2^−127..2^127 lies on fp32's grid down to 2^−128, and beyond its range
it is ±inf, as IEEE says. NaN scales give NaN, −0 stays.

The fp32 product has at most two significand bits and fp32 shares bf16's exponent range, so its upper half *is* the
bf16 result, subnormals, infinities and NaN included. fp16 takes one rounding from the exact fp32 value.
Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.3.3 and 5.4.1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxref.formats import MXFP4
from mxref.fragments import REST, SHIFTS, SPREAD

__all__ = ["BLOCK", "e2m1", "e8m0", "load_mxfp4_tile", "narrow"]

BLOCK = tl.constexpr(MXFP4.block_size)
SCALE_NAN = tl.constexpr(MXFP4.scale.nan)
PLACEMENT = tl.constexpr(2.0**126)
SCALE_MIN_BITS = tl.constexpr(0x00400000)  # 2^−127, an fp32 subnormal
NAN_BITS = tl.constexpr(0x7FC00000)
BETWEEN_PAIRS = tl.constexpr(SHIFTS[1])
LAST_SHIFT = tl.constexpr(SHIFTS[-1])
LAST_BITS = tl.constexpr(REST)
LAST_SPREAD = tl.constexpr(SPREAD)


@triton.jit
def e2m1(codes):
    """The fp32 value of each code (uint8, 0..15)."""
    codes = codes.to(tl.uint32)
    placed = ((codes & 8) << 28) | ((codes & 7) << 22)
    return placed.to(tl.float32, bitcast=True) * PLACEMENT


@triton.jit
def e8m0(scale_bytes):
    """The fp32 value 2^(b−127) of each scale byte (uint8): 2^−127 for 0, NaN for 255."""
    b = scale_bytes.to(tl.uint32)
    bits = tl.where(b == 0, SCALE_MIN_BITS, b << 23)
    return tl.where(b == SCALE_NAN, NAN_BITS, bits).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def narrow(w, dtype: tl.constexpr):
    """A decoded fp32 weight as `dtype`: exact for bf16 and fp32, one rounding for fp16."""
    if dtype == tl.bfloat16:
        return (w.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return w.to(dtype)


@triton.jit
def load_mxfp4_tile(
    packed,
    scales,
    expert,
    n,
    k0,
    N,
    K,
    dtype: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FRAGMENTS: tl.constexpr,
):
    """The fp32 values of W_expert at rows n [ROWS] and columns k0..k0+COLS, held in `dtype`'s precision: [ROWS,
    COLS].

    `packed` is [E, N, K/2] and `scales` [E, N, K/32], both contiguous; k0 and COLS are multiples of 32. What lies
    outside [N, K] is 0. FRAGMENTS: the layout of that name.
    """
    if FRAGMENTS:
        return load_fragments_tile(packed, scales, expert, n, k0, N, K, dtype, ROWS, COLS)
    row = (expert.to(tl.int64) * N + n)[:, None]
    pairs = (k0 // 2 + tl.arange(0, COLS // 2))[None, :]
    blocks = (tl.arange(0, COLS // BLOCK) + k0 // BLOCK)[None, :]
    inside = (n < N)[:, None]
    nibbles = tl.load(packed + row * (K // 2) + pairs, mask=inside & (pairs < K // 2), other=0)
    scale = tl.load(scales + row * (K // BLOCK) + blocks, mask=inside & (blocks < K // BLOCK), other=0)
    codes = tl.join(nibbles & 0xF, nibbles >> 4).reshape(ROWS, COLS // BLOCK, BLOCK)
    w = (e2m1(codes) * e8m0(scale)[:, :, None]).reshape(ROWS, COLS)
    if dtype == tl.float16:
        return w.to(tl.float16).to(tl.float32)
    return w


@triton.jit
def load_fragments_tile(
    packed, scales, expert, n, k0, N, K, dtype: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """`load_mxfp4_tile` of bytes in the layout FRAGMENTS, see `mxref.fragments`, where 32 divides N and the first n.

    `packed` is aligned to four bytes. Each of a word's four pairs of codes is moved to its place and masked.
    """
    GROUPS: tl.constexpr = ROWS // BLOCK
    BLOCKS: tl.constexpr = COLS // BLOCK
    group = tl.min(n.to(tl.int32).reshape(GROUPS, BLOCK), axis=1) // BLOCK
    block = k0 // BLOCK + tl.arange(0, BLOCKS)
    inside = ((group < N // BLOCK)[:, None] & (block < K // BLOCK)[None, :])[:, :, None]
    tile = ((expert.to(tl.int64) * (N // BLOCK) + group)[:, None] * (K // BLOCK) + block[None, :])[:, :, None]

    words = packed.to(tl.pointer_type(tl.uint32)) + tile * 128 + tl.arange(0, 128)[None, None, :]
    first, second = tl.split(tl.load(words, mask=inside, other=0).reshape(GROUPS, BLOCKS, 64, 2))
    pairs = tl.join(_pairs(first, second), _pairs(second, first))
    codes = tl.join(pairs << 16, pairs & 0xFFFF0000)  # an fp32's upper half is its bf16
    codes = codes.reshape(GROUPS, BLOCKS, 2, 4, 4, 2, 2, 2, 2, 2)  # b, τ, t, j, h, i, q, p
    codes = codes.permute(0, 2, 7, 3, 8, 1, 5, 6, 4, 9).reshape(ROWS, BLOCKS, BLOCK)

    scale = tl.load(scales + tile * BLOCK + tl.arange(0, BLOCK)[None, None, :], mask=inside, other=0)
    scale = scale.reshape(GROUPS, BLOCKS, 4, 2, 2, 2).permute(0, 3, 4, 2, 5, 1).reshape(ROWS, BLOCKS)
    w = (codes.to(tl.float32, bitcast=True) * PLACEMENT * e8m0(scale)[:, :, None]).reshape(ROWS, COLS)
    if dtype == tl.float16:
        return w.to(tl.float16).to(tl.float32)
    return w


@triton.jit
def _pairs(word, other):
    """The pairs [h, i] of a row's codes, the last in the other row's word: each code where bf16 has a sign and the
    lowest magnitude bits, 2^−126 of its value."""
    last = ((other << LAST_SHIFT | other >> 32 - LAST_SHIFT) & LAST_BITS) * LAST_SPREAD
    i0 = tl.join(word, word << BETWEEN_PAIRS)
    return tl.join(i0, tl.join(word << LAST_SHIFT, last)) & 0x81C081C0
