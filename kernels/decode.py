"""MXFP4 decode inside a kernel: packed nibbles and E8M0 bytes to floating-point values, every case exact.

Both factors are built from bits; no `exp2`, no `ldexp`. A code's three magnitude bits, placed at fp32's low
exponent bits and top mantissa bit, read as value · 2^−126, whatever the code (0.5 becomes a subnormal). One
multiply by 2^126 yields the value, a second by the block's scale the weight. Neither rounds: the product of a
two-bit significand and a power of two in 2^−127..2^127 lies on fp32's grid down to 2^−128, and beyond its range
it is ±inf, as IEEE says. NaN scales give NaN, −0 stays.

The fp32 product has at most two significand bits and fp32 shares bf16's exponent range, so its upper half *is* the
bf16 result, subnormals, infinities and NaN included. fp16 takes one rounding from the exact fp32 value.

`decode_words` is what the products use: words of eight codes, in this portable form or, for bf16 on a GPU, two codes at
a time in inline PTX, with the same bits.
Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.3.3 and 5.4.1.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["decode_words", "e2m1", "e8m0", "narrow"]

PLACEMENT = tl.constexpr(2.0**126)
SCALE_MIN_BITS = tl.constexpr(0x00400000)  # 2^−127, an fp32 subnormal
NAN_BITS = tl.constexpr(0x7FC00000)


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
    return tl.where(b == 255, NAN_BITS, bits).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def narrow(w, dtype: tl.constexpr):
    """A decoded fp32 weight as `dtype`: exact for bf16 and fp32, one rounding for fp16."""
    if dtype == tl.bfloat16:
        return (w.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return w.to(dtype)


@triton.jit
def decode_words(words, scales, precision: tl.constexpr, dtype: tl.constexpr, FAST: tl.constexpr):
    """Words of eight codes (int32 [R, W], k ascending from the lowest nibble) and their scale bytes [R, W], decoded.

    Returns:
        The values in `precision`, held in `dtype`, [R, W, 2, 2, 2]; the last three axes are the bits of a code's number
        in its word, highest first. The two types differ under the interpreter only, whose operands are fp32.

    FAST holds for bf16 on a GPU: two codes at a time, see `_eight_codes`. The portable form gives the same bits.
    """
    R: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    if FAST:
        b = scales.to(tl.uint16)
        edge = tl.where(((b + 1) & 0xFE) == 0, 0x40, 0)  # byte 0 is 2^−127, a bf16 subnormal; byte 255 is NaN
        even0, even1, odd0, odd1 = _eight_codes(words, ((b << 7) | edge).to(tl.uint16).to(tl.bfloat16, bitcast=True))
        return tl.join(tl.join(_halves(even0), _halves(even1)), tl.join(_halves(odd0), _halves(odd1)))
    else:
        codes = (words[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]) & 0xF
        w = e2m1(codes) * e8m0(scales)[:, :, None]
        if precision == tl.float16:
            w = w.to(tl.float16).to(tl.float32)
        return narrow(w, dtype).reshape(R, W, 2, 2, 2)


@triton.jit
def _halves(pair):
    """Both bf16 values of a register: [R, W] of 32 bits to [R, W, 2]."""
    first = pair.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.join(first, (pair >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True))


@triton.jit
def _eight_codes(words, scale):
    """Codes (0, 4), (2, 6), (1, 5), (3, 7) of each word times its bf16 scale, as pairs of bf16 in 32 bits.

    Nibbles 0 and 4 of a word lie sixteen bits apart. n·0x1040 puts a copy of each with its sign at bit 15 and one with
    its magnitude at bits 6 to 8, the low exponent and top mantissa bits of a bf16: value · 2^−126, as in `e2m1`. Two
    exact products follow, written as fused additions of −0, which sm_80 has too and which keep every bit, −0 included.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 t, v, s, placement, zero;
        mov.b32 placement, 0x7E807E80;
        mov.b32 zero, 0x80008000;
        mov.b32 s, {$5, $5};
        shr.u32 v, $4, 8;
        and.b32 t, $4, 0x000F000F;
        mul.lo.u32 t, t, 0x1040;
        and.b32 t, t, 0x81C081C0;
        fma.rn.bf16x2 t, t, placement, zero;
        fma.rn.bf16x2 $0, t, s, zero;
        and.b32 t, v, 0x000F000F;
        mul.lo.u32 t, t, 0x1040;
        and.b32 t, t, 0x81C081C0;
        fma.rn.bf16x2 t, t, placement, zero;
        fma.rn.bf16x2 $1, t, s, zero;
        and.b32 t, $4, 0x00F000F0;
        mul.lo.u32 t, t, 0x0104;
        and.b32 t, t, 0x81C081C0;
        fma.rn.bf16x2 t, t, placement, zero;
        fma.rn.bf16x2 $2, t, s, zero;
        and.b32 t, v, 0x00F000F0;
        mul.lo.u32 t, t, 0x0104;
        and.b32 t, t, 0x81C081C0;
        fma.rn.bf16x2 t, t, placement, zero;
        fma.rn.bf16x2 $3, t, s, zero;
        }
        """,
        "=r,=r,=r,=r,r,h",
        [words, scale],
        dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
        is_pure=True,
        pack=1,
    )
