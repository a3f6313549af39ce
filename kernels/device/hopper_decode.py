"""Decoding for `hopper`: which thread holds which weights, and how their codes and scales become bf16.

A left operand's 32-bit register holds two neighbours of the contraction. In Y these are the two codes of one byte. In D
they are the same code of two bytes, from two rows of W; so the two codes of a byte belong to two output columns, which
the tensor core's layout puts eight apart: within sixteen, accumulator row 8h + g is column 2g + h (`column_of`).

Scale bytes are too narrow for asynchronous copies: each is loaded an iteration ahead, converted once to bf16 and put
into shared memory.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

__all__ = ["STEP", "column_of", "decode_step", "load_scales", "scales_of_step", "store_scales"]

STEP = gl.constexpr(64)
"""Elements of the contraction in one step; an iteration takes two."""

_PLACEMENT = gl.constexpr(0x7E807E80)  # 2^126 twice, in bf16


# Which thread holds what, as bit matrices: a row says by how much a bit of the register, lane or warp number moves.


@constexpr_function
def _forward_bytes() -> Any:
    """Bytes [n, 32-block, byte] of a step: those whose codes the left operand's layout gives to a thread."""
    return gl.DistributedLinearLayout(
        reg_bases=[[8, 0, 0], [0, 0, 4], [0, 0, 8], [0, 1, 0]],
        lane_bases=[[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0], [64, 0, 0]],
        block_bases=[],
        shape=[128, 2, 16],
    )


@constexpr_function
def _backward_bytes() -> Any:
    """Bytes [n, byte] of a step."""
    return gl.DistributedLinearLayout(
        reg_bases=[[1, 0], [8, 0], [16, 0], [32, 0]],
        lane_bases=[[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]],
        warp_bases=[[0, 8], [0, 16], [0, 32]],
        block_bases=[],
        shape=[64, 64],
    )


@constexpr_function
def _backward_pairs() -> Any:
    """Pairs of bytes [pair of n, 32-block, byte] of a step."""
    return gl.DistributedLinearLayout(
        reg_bases=[[4, 0, 0], [8, 0, 0], [16, 0, 0]],
        lane_bases=[[1, 0, 0], [2, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]],
        warp_bases=[[0, 0, 8], [0, 1, 0], [0, 2, 0]],
        block_bases=[],
        shape=[32, 4, 16],
    )


@constexpr_function
def _backward_scales() -> Any:
    """Scales [32-block, n] of a step: both of a pair in one thread."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 8], [0, 16], [0, 32]],
        lane_bases=[[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]],
        warp_bases=[[0, 0], [1, 0], [2, 0]],
        block_bases=[],
        shape=[4, 64],
    )


@gluon.jit
def scale_bits(b):
    """The bf16 bits of 2^(b−127) for bytes b (uint32): a subnormal for 0, NaN for 255."""
    edge = gl.where(((b + 1) & 0xFE) == 0, 0x40, 0).to(gl.uint32)
    return (b << 7) | edge


@gluon.jit
def codes_of_byte(codes, scale):
    """The two codes of each byte (uint32, low nibble first) times a scale (twice in 32 bits), as two bf16 in 32 bits.

    The nibbles go to bits 0 to 3 of either half. n·0x1040 puts a copy of each with its sign at bit 15 and one with its
    magnitude at bits 6 to 8: the bf16 value · 2^−126, as in `decode`. Two exact products follow.
    """
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b32 t;
        mul.lo.u32 t, $1, 0x1001;
        and.b32 t, t, 0x000F000F;
        mul.lo.u32 t, t, 0x1040;
        and.b32 t, t, 0x81C081C0;
        mul.rn.bf16x2 t, t, $3;
        mul.rn.bf16x2 $0, t, $2;
        }
        """,
        "=r,r,r,r",
        [codes, scale, _PLACEMENT],
        dtype=gl.uint32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def codes_of_two_bytes(pair, scales):
    """The low codes, and the high codes, of two bytes (bits 0 to 7 and 16 to 23) times their scales: two bf16 each."""
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b32 t;
        and.b32 t, $2, 0x000F000F;
        mul.lo.u32 t, t, 0x1040;
        and.b32 t, t, 0x81C081C0;
        mul.rn.bf16x2 t, t, $4;
        mul.rn.bf16x2 $0, t, $3;
        and.b32 t, $2, 0x00F000F0;
        mul.lo.u32 t, t, 0x0104;
        and.b32 t, t, 0x81C081C0;
        mul.rn.bf16x2 t, t, $4;
        mul.rn.bf16x2 $1, t, $3;
        }
        """,
        "=&r,=&r,r,r,r",
        [pair, scales, _PLACEMENT],
        dtype=(gl.uint32, gl.uint32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def halves(pair):
    """Both bf16 of 32 bits, along a new last axis."""
    low = pair.to(gl.uint16).to(gl.bfloat16, bitcast=True)
    return gl.join(low, (pair >> 16).to(gl.uint16).to(gl.bfloat16, bitcast=True))


@gluon.jit
def decode_step(w, scales, operand: gl.constexpr, TRANSPOSED: gl.constexpr):
    """One step's weights as the left operand [128, 64], from shared memory: bytes `w` and bf16 bits `scales`.

    Y: w [128 n, 32], scales uint32 [128 n, 2]. D: w [64 n, 64], scales uint16 [4, 64 n].
    """
    if TRANSPOSED:
        pairs: gl.constexpr = _backward_pairs()
        codes = w.load(_backward_bytes()).to(gl.uint32)
        even, odd = gl.split(codes.reshape([32, 2, 64]).permute([0, 2, 1]))
        pair = gl.convert_layout((even | (odd << 16)).reshape([32, 4, 16]), pairs, assert_trivial=True)
        even, odd = gl.split(scales.load(_backward_scales()).to(gl.uint32).reshape([4, 32, 2]))
        scale = gl.convert_layout((even | (odd << 16)).permute([1, 0]), gl.SliceLayout(2, pairs), assert_trivial=True)
        pair, scale = gl.broadcast(pair, gl.expand_dims(scale, 2))
        low, high = codes_of_two_bytes(pair, scale)
        weight = gl.join(halves(low), halves(high)).reshape([32, 8, 8, 2, 2]).permute([1, 4, 2, 0, 3])
    else:
        layout: gl.constexpr = _forward_bytes()
        codes = w.reshape([128, 2, 16]).load(layout).to(gl.uint32)
        scale = gl.expand_dims(scales.load(gl.SliceLayout(2, layout)), 2)
        codes, scale = gl.broadcast(codes, scale)
        weight = halves(codes_of_byte(codes, scale))
    return gl.convert_layout(weight.reshape([128, 64]), operand, assert_trivial=True)


@gluon.jit
def load_scales(at, n, block, blocks, C, J, step, TRANSPOSED: gl.constexpr, ALIGNED: gl.constexpr):
    """The scale bytes of the iteration that begins with `step`, two neighbours in 16 bits; 0 outside.

    Args:
        at: where they lie, [128 n, 2].
        n, block: their rows of W, and their 32-blocks as of the first iteration.
        blocks: K/32.
        step: the iteration's first; for Y the blocks advance, for D the rows.
        ALIGNED: `blocks` is even.
    """
    if TRANSPOSED:
        rows, left = (n < C - step * STEP)[:, None], (blocks - block)[None, :]
    else:
        rows, left = (n < J)[:, None], (blocks - 2 * step - block)[None, :]
    if ALIGNED:
        return gl.load(at.to(gl.pointer_type(gl.uint16)), mask=rows & (left > 0), other=0)
    else:
        low = gl.load(at, mask=rows & (left > 0), other=0).to(gl.uint16)
        return low | (gl.load(at + 1, mask=rows & (left > 1), other=0).to(gl.uint16) << 8)


@gluon.jit
def store_scales(smem, two, TRANSPOSED: gl.constexpr):
    """Convert an iteration's scales and put them where `decode_step` reads them."""
    two = two.to(gl.uint32)
    bits = gl.join(scale_bits(two & 0xFF), scale_bits(two >> 8)).reshape([128, 4])
    if TRANSPOSED:
        smem.store(bits.to(gl.uint16).permute([1, 0]))
    else:
        smem.store(bits * 0x10001)


@gluon.jit
def scales_of_step(smem, step: gl.constexpr, TRANSPOSED: gl.constexpr):
    """The part of an iteration's scales that its first or second step needs."""
    return smem.slice(64 * step, 64, dim=1) if TRANSPOSED else smem.slice(2 * step, 2, dim=1)


@gluon.jit
def column_of(m, TRANSPOSED: gl.constexpr):
    """The output column, counted from the tile's first, of an accumulator row."""
    if TRANSPOSED:
        return m & ~15 | (m & 7) << 1 | (m >> 3) & 1
    else:
        return m
