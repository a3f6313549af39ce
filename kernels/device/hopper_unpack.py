"""Decoding of the layout FRAGMENTS for `hopper_fragments`: a thread's 16-byte words become its left operand of `wgmma`.

See `mxref.fragments` for the tiles, and for which bits are whose. A warp owns 32 output columns, two fragments f of 16:

    column = 32·warp + 16·(g // 4) + 8·f + 2·(g % 4) + h, of row 8·h + g of fragment f

In Y a thread reads a tile's 16 bytes whole. In D, whose contraction runs over the tile's rows, it reads 8 bytes, one j,
of each b; the halves of its two words, whose codes are neighbours along k, are exchanged for neighbours along n.

Where every scale byte is at most 128, code bits placed at bf16's lowest exponent bits, value · 2^−126, take one exact
product with 2^(b − 1). Otherwise two, with 2^126 and with 2^(b − 127).
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from mxref.fragments import REST, SHIFTS, SPREAD
from mxref.kernels.device.hopper_decode import halves

__all__ = ["column_of_row", "rows_to_columns", "unpack_tile"]

_PLACEMENT = gl.constexpr(0x7E807E80)  # 2^126 twice, in bf16


@constexpr_function
def _warps(warps: int, groups: int) -> list[list[int]]:
    return [[0, 1 << bit, 0] for bit in range(warps.bit_length() - 1)] + [[0, 0, 0]] * (groups.bit_length() - 1)


@constexpr_function
def _words(transposed: bool, warps: int, groups: int) -> Any:
    """Words [warp, 128] of the warps' tiles, as a thread takes them; every group of warps takes them all."""
    lanes, registers = [4, 8, 16, 32, 64], [1, 2]  # t, τ, b; i, j
    if transposed:
        lanes, registers = [16, 32, 4, 8, 2], [1, 64]  # τ, t, j; i, b
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, word] for word in registers],
        lane_bases=[[0, 0, word] for word in lanes],
        warp_bases=_warps(warps, groups),
        block_bases=[],
        shape=[1, warps, 128],
    )


@constexpr_function
def _scale_words(transposed: bool, warps: int, groups: int) -> Any:
    """Scales [warp, (τ, b)] of the warps' tiles, four bytes a word."""
    lanes, registers = [0, 0, 2, 4, 1], []  # t, t, τ, b
    if transposed:
        lanes, registers = [2, 4, 0, 0, 0], [1]  # τ, t, t, j; b
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, word] for word in registers],
        lane_bases=[[0, 0, word] for word in lanes],
        warp_bases=_warps(warps, groups),
        block_bases=[],
        shape=[1, warps, 8],
    )


@gluon.jit
def column_of_row(m, WARPS: gl.constexpr):
    """The output column, counted from the program's first, of an accumulator row."""
    f, warp, h, g = m // (16 * WARPS), m // 16 % WARPS, m // 8 % 2, m % 8
    return 32 * warp + 16 * (g // 4) + 8 * f + 2 * (g % 4) + h


@gluon.jit
def rows_to_columns(y, BLOCK_M: gl.constexpr, WARPS: gl.constexpr):
    """Accumulator rows, the last axis of y [BLOCK_M, 32·WARPS], in the order of their columns."""
    y = y.reshape([BLOCK_M, 2, WARPS, 2, 2, 4]).permute([0, 2, 4, 1, 5, 3])
    return y.reshape([BLOCK_M, 32 * WARPS])


def _scale_program(transposed: bool, one_multiply: bool) -> str:
    """PTX from a word of scale bytes (i, q) to bf16 twice in 32 bits: of each (i, q), transposed of both q of each i.

    2^(b − 1) for bytes up to 128 and one product; otherwise 2^(b − 127): a subnormal for 0, NaN for 255.
    """
    selectors, factor = (0x4140, 0x4342) if transposed else (0x4040, 0x4141, 0x4242, 0x4343), 0x80
    if one_multiply and not transposed:  # one copy of a byte, which a product doubles, on another pipe than a shift
        selectors, factor = (0x4440, 0x4441, 0x4442, 0x4443), 0x00800080
    lines = ["{ .reg .b32 b, edge;"]
    for number, selector in enumerate(selectors):
        lines.append(f"prmt.b32 b, ${len(selectors)}, 0, {selector};")
        if one_multiply:
            lines.append("mov.b32 edge, 0x3F003F00;")
        else:  # bit 6 where b + 1 is 1 or 256
            lines += ["add.u32 edge, b, 0x00010001;", "and.b32 edge, edge, 0x00FE00FE;"]
            lines += ["add.u32 edge, edge, 0x00FE00FE;", "shr.u32 edge, edge, 2;"]
            lines += ["not.b32 edge, edge;", "and.b32 edge, edge, 0x00400040;"]
        lines.append(f"mad.lo.u32 ${number}, b, {factor}, edge;")
    return "\n".join([*lines, "}"])


def _code_program(transposed: bool, one_multiply: bool) -> str:
    """PTX from words q of a j ($8, $9) and scales to eight registers of two bf16.

    Y: (i, h, q), both p in a register; the scales are $10 to $13. D: (i, h, p), both q; the scales are $10 and $11.
    """
    lines = ["{ .reg .b32 w0, w1, t0, t1, t2, t3, t4, t5, t6, t7;"]
    if transposed:
        lines += ["prmt.b32 w0, $8, $9, 0x5410;", "prmt.b32 w1, $8, $9, 0x7632;"]
        scales, placement = (10, 10, 10, 10, 11, 11, 11, 11), "$12"
    else:
        lines += ["mov.b32 w0, $8;", "mov.b32 w1, $9;"]
        scales, placement = (10, 11, 10, 11, 12, 13, 12, 13), "$14"
    for n in range(2):
        rotated, last = f"t{4 + n}", f"t{7 - n}"
        lines += [f"mov.b32 t{n}, w{n};", f"shl.b32 t{2 + n}, w{n}, {SHIFTS[1]};"]
        lines += [f"shf.r.wrap.b32 {rotated}, w{n}, w{n}, {32 - SHIFTS[2]};"]
        lines += [f"and.b32 {last}, {rotated}, {REST};", f"mul.lo.u32 {last}, {last}, {SPREAD};"]
    lines += [f"and.b32 t{r}, t{r}, 0x81C081C0;" for r in range(8)]
    if not one_multiply:
        lines += [f"mul.rn.bf16x2 t{r}, t{r}, {placement};" for r in range(8)]
    return "\n".join([*lines, *(f"mul.rn.bf16x2 ${r}, t{r}, ${scale};" for r, scale in enumerate(scales)), "}"])


_SCALES_Y = gl.constexpr((_scale_program(False, False), _scale_program(False, True)))
_SCALES_D = gl.constexpr((_scale_program(True, False), _scale_program(True, True)))
_CODES_Y = gl.constexpr((_code_program(False, False), _code_program(False, True)))
_CODES_D = gl.constexpr((_code_program(True, False), _code_program(True, True)))


@gluon.jit
def unpack_tile(
    w, scales, operand: gl.constexpr, TRANSPOSED: gl.constexpr, ONE_MULTIPLY: gl.constexpr, GROUPS: gl.constexpr
):
    """One tile for each warp of a group as the left operand [32·warps, 32], the same in every group.

    Args:
        w: shared memory, uint32 [1, warps, 128]: codes.
        scales: shared memory, uint32 [1, warps, 8]: their scales, four bytes a word.
    """
    WARPS: gl.constexpr = w.shape[1]
    pairs = w.load(_words(TRANSPOSED, WARPS, GROUPS)).reshape([WARPS, 2, 4, 4, 2, 2])  # [warp, b, τ, t, j, i]
    w0, w1 = gl.split(pairs)
    word = scales.load(_scale_words(TRANSPOSED, WARPS, GROUPS))
    if TRANSPOSED:
        s = gl.inline_asm_elementwise(
            _SCALES_D[ONE_MULTIPLY], "=&r,=&r,r", [word], dtype=(gl.uint32,) * 2, is_pure=True, pack=1
        )
        r = gl.inline_asm_elementwise(
            _CODES_D[ONE_MULTIPLY],
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r",
            [w0, w1, _beside(s[0], w0), _beside(s[1], w0), _PLACEMENT],
            dtype=(gl.uint32,) * 8,
            is_pure=True,
            pack=1,
        )
    else:
        s = gl.inline_asm_elementwise(
            _SCALES_Y[ONE_MULTIPLY], "=&r,=&r,=&r,=&r,r", [word], dtype=(gl.uint32,) * 4, is_pure=True, pack=1
        )
        r = gl.inline_asm_elementwise(
            _CODES_Y[ONE_MULTIPLY],
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r",
            [w0, w1, _beside(s[0], w0), _beside(s[1], w0), _beside(s[2], w0), _beside(s[3], w0), _PLACEMENT],
            dtype=(gl.uint32,) * 8,
            is_pure=True,
            pack=1,
        )
    i0 = gl.join(gl.join(halves(r[0]), halves(r[1])), gl.join(halves(r[2]), halves(r[3])))
    i1 = gl.join(gl.join(halves(r[4]), halves(r[5])), gl.join(halves(r[6]), halves(r[7])))
    eight = gl.join(i0, i1)  # [warp, b, τ, t, j, half, q or p, h, i]
    if TRANSPOSED:
        weight = eight.permute([7, 0, 6, 4, 3, 1, 8, 2, 5])
    else:
        weight = eight.permute([8, 0, 6, 1, 2, 4, 7, 3, 5])
    return gl.convert_layout(weight.reshape([32 * WARPS, 32]), operand, assert_trivial=True)


@gluon.jit
def _beside(scale, codes):
    """Scales [1, warp, (τ, b)] for codes [warp, b, τ, t, j]."""
    own: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, codes.type.layout))
    scale = scale.reshape([scale.shape[1], 4, 2]).permute([0, 2, 1])
    scale = gl.convert_layout(scale, own, assert_trivial=True)
    scale, codes = gl.broadcast(gl.expand_dims(gl.expand_dims(scale, 3), 4), codes)
    return scale
