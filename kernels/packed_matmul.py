"""The two products that read packed MXFP4 weights: Y on the forward's way, D on the way back, from the same bytes.

    Y[p, n] = R( s · Σ_r Z[p, r] · B_e[n, r]  +  Σ_k x[p, k] · W_e[k, n]  +  bias_e[n] )
    D[p, k] = R( s · Σ_r V[p, r] · A_e[r, k]  +  Σ_n dY[p, n] · W_e[k, n] )

Codes are read as 32-bit words of eight. Decoding a word yields pairs of codes that lie four apart, because one mask and
one multiply then place two codes at once; nothing is moved to undo that. What it costs is a permutation:

- Y computes Wᵀ·xᵀ, so that decoded weights go from registers straight into the tensor cores as their left operand.
  Each 32-block of the contraction is visited even k first, odd k after (`contraction_order`); x's columns are put in
  that order once per call, by `permute_columns`.
- D contracts over n in natural order. Here the output's columns come permuted within groups of eight, and are put
  straight once, when the accumulator is stored.

The chain is that of `grouped_matmul`: LoRA's product first, one multiply by s in fp32, the base product, the bias, one
rounding. The scale bytes of a step are fetched one step ahead: single bytes are too narrow for an asynchronous copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxref.kernels.decode import decode_words
from mxref.kernels.launch import cdiv, launch
from mxref.kernels.schedule import source_rows
from mxref.weights import MXWeights

__all__ = ["contraction_order", "packed_backward_kernel", "packed_forward_kernel", "permute_columns", "words_of"]


@triton.jit
def permute_kernel(out, x, rows, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """One program puts BLOCK_M rows times BLOCK_K columns of x [rows, K] in the order of `contraction_order`."""
    blocks = tl.cdiv(K, BLOCK_K)
    m = ((tl.program_id(0) // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    k = ((tl.program_id(0) % blocks) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    mask = (m < rows) & (k < K)
    tile = tl.load(x + m * K + k, mask=mask)
    tile = tile.reshape(BLOCK_M, BLOCK_K // 32, 4, 2, 2, 2).permute(0, 1, 5, 4, 2, 3).reshape(BLOCK_M, BLOCK_K)
    tl.store(out + m * K + k, tile, mask=mask)


@triton.jit
def settled(acc):
    """`acc` itself, read: a tensor core's product must then be complete.

    Triton otherwise leaves a step's last wgmma in flight while the next step begins. Its left operand lies in registers
    that ptxas gives to the next step's codes: they were seen overwritten, and results to differ from run to run.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [acc], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def packed_forward_kernel(
    out,
    rows_in,
    words,
    scales,
    low,
    factor,
    bias,
    positions,
    tiles,
    P,
    E,
    C,
    J,
    RANK,
    s,
    fan_in,
    fan_out,
    stride_fe,
    stride_fr,
    stride_fj,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    SETTLE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program computes a row tile times BLOCK_N columns of Y; words [E, J, C/8], scales [E, J, C/32].

    rows_in [*, C] has its columns in the order of `contraction_order`; the rest is as in `grouped_matmul_kernel`.
    EVEN: BLOCK_K divides C and BLOCK_N divides J. SETTLE: see `settled`; true where products are wgmma instructions.
    """
    BLOCKS: tl.constexpr = BLOCK_K // 32
    columns = tl.cdiv(J, BLOCK_N)
    tile = tl.program_id(0) // columns
    j = ((tl.program_id(0) % columns) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    expert = tl.load(tiles + tile * 3).to(tl.int64)
    begin = tl.load(tiles + tile * 3 + 1).to(tl.int64)
    end = tl.load(tiles + tile * 3 + 2).to(tl.int64)
    if begin >= end:
        return

    rows = begin + tl.arange(0, BLOCK_M)
    in_J = j < J
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)

    if expert < E:
        if low is not None:
            r = tl.arange(0, BLOCK_R)
            l_tile = tl.load(
                low + rows[:, None] * RANK + r[None, :], mask=(rows < end)[:, None] & (r < RANK)[None, :], other=0
            )
            f_tile = tl.load(
                factor + expert * stride_fe + r[None, :] * stride_fr + j[:, None] * stride_fj,
                mask=(r < RANK)[None, :] & in_J[:, None],
                other=0,
            )
            acc = tl.dot(f_tile, tl.trans(l_tile), acc, input_precision="ieee") * s

        source, live = source_rows(rows, rows < end, positions, fan_in, P)
        c = tl.arange(0, BLOCK_K)
        w = tl.arange(0, BLOCK_K // 8)
        g = tl.arange(0, BLOCKS)
        x_at = rows_in + source[:, None] * C + c[None, :]
        w_at = words + (expert * J + j)[:, None] * (C // 8) + w[None, :]
        s_at = scales + (expert * J + j)[:, None] * (C // 32) + g[None, :]
        scale = tl.load(s_at, mask=in_J[:, None] & (g < C // 32)[None, :], other=0)
        for c0 in range(0, C, BLOCK_K):
            if EVEN:
                x = tl.load(x_at + c0, mask=live[:, None], other=0)
                codes = tl.load(w_at + c0 // 8)
            else:
                x = tl.load(x_at + c0, mask=live[:, None] & (c < C - c0)[None, :], other=0)
                codes = tl.load(w_at + c0 // 8, mask=in_J[:, None] & (w < (C - c0) // 8)[None, :], other=0)
            ahead = (c0 + BLOCK_K) // 32
            next_scale = tl.load(s_at + ahead, mask=in_J[:, None] & (g < C // 32 - ahead)[None, :], other=0)
            wide = tl.broadcast_to(scale[:, :, None], (BLOCK_N, BLOCKS, 4)).reshape(BLOCK_N, BLOCKS * 4)
            weight = decode_words(codes, wide, PRECISION, x.dtype, FAST)
            weight = weight.reshape(BLOCK_N, BLOCKS, 4, 2, 2, 2).permute(0, 1, 5, 4, 2, 3).reshape(BLOCK_N, BLOCK_K)
            acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
            if SETTLE:
                acc = settled(acc)
            scale = next_scale

        if bias is not None:
            acc += tl.load(bias + expert * J + j, mask=in_J, other=0).to(tl.float32)[:, None]

    # Only now: held through the loop, these rows would cost the second program on a multiprocessor its registers.
    target, keep = source_rows(rows, rows < end, positions, fan_out, P)
    y = tl.trans(acc.to(out.dtype.element_ty))
    tl.store(out + target[:, None] * J + j[None, :], y, mask=keep[:, None] & in_J[None, :])


@triton.jit
def packed_backward_kernel(
    out,
    rows_in,
    words,
    scales,
    low,
    factor,
    positions,
    tiles,
    P,
    E,
    C,
    J,
    RANK,
    s,
    fan_in,
    fan_out,
    stride_fe,
    stride_fr,
    stride_fj,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program computes a row tile times BLOCK_N columns of D; words [E, C, J/8], scales [E, C, J/32].

    Within eight columns the accumulator holds them with the first and the third bit of their number swapped.
    EVEN: as in `packed_forward_kernel`.
    """
    BLOCKS: tl.constexpr = BLOCK_N // 32
    columns = tl.cdiv(J, BLOCK_N)
    tile = tl.program_id(0) // columns
    j0 = (tl.program_id(0) % columns) * BLOCK_N
    expert = tl.load(tiles + tile * 3).to(tl.int64)
    begin = tl.load(tiles + tile * 3 + 1).to(tl.int64)
    end = tl.load(tiles + tile * 3 + 2).to(tl.int64)
    if begin >= end:
        return

    rows = begin + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    if expert < E:
        if low is not None:
            r = tl.arange(0, BLOCK_R)
            n = tl.arange(0, BLOCK_N)
            j = (j0 + (n & ~5 | (n & 1) << 2 | (n >> 2) & 1)).to(tl.int64)
            l_tile = tl.load(
                low + rows[:, None] * RANK + r[None, :], mask=(rows < end)[:, None] & (r < RANK)[None, :], other=0
            )
            f_tile = tl.load(
                factor + expert * stride_fe + r[:, None] * stride_fr + j[None, :] * stride_fj,
                mask=(r < RANK)[:, None] & (j < J)[None, :],
                other=0,
            )
            acc = tl.dot(l_tile, f_tile, acc, input_precision="ieee") * s

        source, live = source_rows(rows, rows < end, positions, fan_in, P)
        c = tl.arange(0, BLOCK_K)
        w = j0 // 8 + tl.arange(0, BLOCK_N // 8)
        g = j0 // 32 + tl.arange(0, BLOCKS)
        x_at = rows_in + source[:, None] * C + c[None, :]
        w_at = words + (expert * C + c)[:, None] * (J // 8) + w[None, :]
        s_at = scales + (expert * C + c)[:, None] * (J // 32) + g[None, :]
        scale = tl.load(s_at, mask=(c < C)[:, None] & (g < J // 32)[None, :], other=0)
        for c0 in range(0, C, BLOCK_K):
            if EVEN:
                x = tl.load(x_at + c0, mask=live[:, None], other=0)
                codes = tl.load(w_at)
            else:
                x = tl.load(x_at + c0, mask=live[:, None] & (c < C - c0)[None, :], other=0)
                codes = tl.load(w_at, mask=(c < C - c0)[:, None] & (w < J // 8)[None, :], other=0)
            w_at += BLOCK_K * (J // 8)
            s_at += BLOCK_K * (J // 32)
            next_scale = tl.load(s_at, mask=(c < C - c0 - BLOCK_K)[:, None] & (g < J // 32)[None, :], other=0)
            wide = tl.broadcast_to(scale[:, :, None], (BLOCK_K, BLOCKS, 4)).reshape(BLOCK_K, BLOCKS * 4)
            weight = decode_words(codes, wide, PRECISION, x.dtype, FAST)
            weight = weight.permute(0, 1, 4, 3, 2).reshape(BLOCK_K, BLOCK_N)
            acc = tl.dot(x, weight, acc, input_precision="ieee")
            scale = next_scale

    target, keep = source_rows(rows, rows < end, positions, fan_out, P)
    d = acc.to(out.dtype.element_ty).reshape(BLOCK_M, BLOCK_N // 8, 2, 2, 2).permute(0, 1, 4, 3, 2)
    d = d.reshape(BLOCK_M, BLOCK_N)
    j = (j0 + tl.arange(0, BLOCK_N)).to(tl.int64)
    tl.store(out + target[:, None] * J + j[None, :], d, mask=keep[:, None] & (j < J)[None, :])


def contraction_order(K: int) -> Tensor:
    """The order in which Y's product visits k, the same for every tiling: int64 [K].

    Bits of k within its 32-block, highest first, t₁t₀ihp become the position p·h·t₁t₀·i: sixteen even k, then sixteen
    odd ones. A tensor core's step takes sixteen.
    """
    k = torch.arange(K).view(K // 32, 4, 2, 2, 2)
    return k.permute(0, 4, 3, 1, 2).reshape(K)


def words_of(weights: MXWeights) -> Tensor:
    """The codes, eight to an int32: [E, N, K/8]; a view, but for a buffer that starts amid a word."""
    packed = weights.packed
    return (packed if packed.storage_offset() % 4 == 0 else packed.clone()).view(torch.int32)


def permute_columns(x: Tensor) -> Tensor:
    """A copy of contiguous x [rows, K] whose columns are in the order of `contraction_order`."""
    out = torch.empty_like(x)
    rows, K = x.shape
    launch(
        permute_kernel,
        cdiv(rows, 16) * cdiv(K, 256),
        num_warps=4,
        num_stages=1,
        out=out,
        x=x,
        rows=rows,
        K=K,
        BLOCK_M=16,
        BLOCK_K=256,
    )
    return out
