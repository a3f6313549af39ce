"""Sums over an expert's rows: dA, dB and dbias. One program owns its output and walks the rows: no atomics.

    out_e[r, j] = R( s · Σ_p low[p, r] · wide[p, j] )      dA: V and x      dB: Z and dY
    out_e[j]    = R( Σ_p wide[p, j] )                      dbias: dY

Rows run in expert order, in steps of BLOCK_K, through one fp32 accumulator; the multiply by s comes last, then the
one rounding, to the parameter's dtype. Experts without rows get exact zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mxref.kernels.device.configs import Config, padded_rank
from mxref.kernels.device.launch import launch
from mxref.kernels.device.schedule import Routing, expert_rows, source_rows

__all__ = ["grouped_outer", "grouped_sum"]


@triton.jit
def grouped_outer_kernel(
    out,
    low,
    wide,
    positions,
    offsets,
    P,
    J,
    RANK,
    s,
    fan,
    stride_oe,
    stride_or,
    stride_oj,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program computes BLOCK_N columns of one expert, all ranks; low [P, RANK], wide [*, J] are contiguous."""
    blocks = tl.cdiv(J, BLOCK_N)
    expert = (tl.program_id(0) // blocks).to(tl.int64)
    j = ((tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    in_J, in_R = j < J, r < RANK
    begin, end = expert_rows(offsets, expert, P)
    acc = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        source, live = source_rows(rows, rows < end, positions, fan, P)
        l_tile = tl.load(low + rows[None, :] * RANK + r[:, None], mask=live[None, :] & in_R[:, None], other=0)
        w_tile = tl.load(wide + source[:, None] * J + j[None, :], mask=live[:, None] & in_J[None, :], other=0)
        acc = tl.dot(l_tile, w_tile, acc, input_precision="ieee")
    tl.store(
        out + expert * stride_oe + r[:, None] * stride_or + j[None, :] * stride_oj,
        (acc * s).to(out.dtype.element_ty),
        mask=in_R[:, None] & in_J[None, :],
    )


@triton.jit
def grouped_sum_kernel(out, wide, positions, offsets, P, J, fan, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """One program sums BLOCK_N columns over one expert's rows, each step of BLOCK_K rows first within itself."""
    blocks = tl.cdiv(J, BLOCK_N)
    expert = (tl.program_id(0) // blocks).to(tl.int64)
    j = ((tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    begin, end = expert_rows(offsets, expert, P)
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        source, live = source_rows(rows, rows < end, positions, fan, P)
        tile = tl.load(wide + source[:, None] * J + j[None, :], mask=live[:, None] & (j < J)[None, :], other=0)
        acc += tl.sum(tile.to(tl.float32), axis=0)
    tl.store(out + expert * J + j, acc.to(out.dtype.element_ty), mask=j < J)


def grouped_outer(
    low: Tensor, wide: Tensor, routing: Routing, config: Config, scaling: float, out: Tensor, fan: int | None
) -> None:
    """Fill `out`, a view [E, r, J] with any strides, with s · lowᵀ · wide over each expert's rows.

    Args:
        low: contiguous [P, r], in expert order.
        wide: contiguous [*, J].
        routing: which rows belong to which expert.
        config: the call's tiling, from which this product's follows.
        scaling: s.
        out: what to fill, in the parameter's dtype.
        fan: None if `wide` is in expert order; otherwise a routed row is row position // fan of it.
    """
    E, rank, J = out.shape
    config = config.outer()
    stride_oe, stride_or, stride_oj = out.stride()
    launch(
        grouped_outer_kernel,
        E * triton.cdiv(J, config.BLOCK_N),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        out=out,
        low=low,
        wide=wide,
        positions=routing.positions,
        offsets=routing.offsets,
        P=routing.P,
        J=J,
        RANK=rank,
        s=float(scaling),
        fan=fan,
        stride_oe=stride_oe,
        stride_or=stride_or,
        stride_oj=stride_oj,
        BLOCK_R=padded_rank(rank),
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
    )


def grouped_sum(wide: Tensor, routing: Routing, out: Tensor, fan: int | None) -> None:
    """Fill contiguous `out` [E, J] with the sum of `wide` over each expert's rows; `fan` as in `grouped_outer`."""
    E, J = out.shape
    launch(
        grouped_sum_kernel,
        E * triton.cdiv(J, 128),
        num_warps=4,
        num_stages=1,
        out=out,
        wide=wide,
        positions=routing.positions,
        offsets=routing.offsets,
        P=routing.P,
        J=J,
        fan=fan,
        BLOCK_N=128,
        BLOCK_K=32,
    )
