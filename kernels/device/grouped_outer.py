"""Sums over an expert's rows: dA, dB and dbias. One program owns its output and walks the rows: no atomics.

    out_e[r, j] = R( s · Σ_p low[p, r] · wide[p, j] )      dA: V and x      dB: Z and dY
    out_e[j]    = R( Σ_p wide[p, j] )                      dbias: dY

Rows run in expert order, in steps of BLOCK_K, through one fp32 accumulator; the multiply by s comes last, then the
one rounding, to the parameter's dtype. Experts without rows get exact zeros. One launch makes dA and dB.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mxref.kernels.device.configs import Config, padded_rank
from mxref.kernels.device.launch import PreparedLaunch, kinds
from mxref.kernels.device.schedule import Routing, expert_rows, source_rows
from mxref.kernels.device.stack import Stack

__all__ = ["Outer", "grouped_outer", "grouped_sum"]

Layout = tuple[int, int | None, int, int, int]
"""J, the fan, and the output's strides."""


@triton.jit(do_not_specialize=["P", "E"], do_not_specialize_on_alignment=["positions", "offsets"])
def grouped_outer_kernel(
    positions,
    offsets,
    out,
    low,
    wide,
    other_out,
    other_low,
    other_wide,
    P,
    E,
    RANK,
    s,
    J,
    fan,
    stride_oe,
    stride_or,
    stride_oj,
    other_J,
    other_fan,
    other_stride_oe,
    other_stride_or,
    other_stride_oj,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sums of one pair of operands, and behind their programs those of another pair, if there is one."""
    program = tl.program_id(0)
    programs = E * tl.cdiv(J, BLOCK_N)
    if program < programs:
        outer_tile(
            out, low, wide, positions, offsets, program, P, J, RANK, s, fan, stride_oe, stride_or, stride_oj,
            BLOCK_R, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif other_out is not None:
        outer_tile(
            other_out, other_low, other_wide, positions, offsets, program - programs, P, other_J, RANK, s, other_fan,
            other_stride_oe, other_stride_or, other_stride_oj, BLOCK_R, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def outer_tile(
    out,
    low,
    wide,
    positions,
    offsets,
    tile,
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
    """BLOCK_N columns of one expert, all ranks; low [P, RANK], wide [*, J] are contiguous."""
    blocks = tl.cdiv(J, BLOCK_N)
    expert = (tile // blocks).to(tl.int64)
    j = ((tile % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
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


@triton.jit(do_not_specialize=["P"], do_not_specialize_on_alignment=["positions", "offsets"])
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


class Outer(NamedTuple):
    """What is known beside its tensors of one sum over an expert's rows, out_e = R( s · lowᵀ · wide ).

    Attributes:
        out: what is filled, [E, r, J] in the parameter's dtype.
        fan: None if `wide` is in expert order; otherwise a routed row is row position // fan of it.
    """

    out: Stack
    fan: int | None

    @property
    def layout(self) -> Layout:
        """How the kernel is told."""
        return (self.out.shape[2], self.fan, *self.out.strides)


def grouped_outer(config: Config, P: int, s: float, first: Outer, other: Outer | None = None) -> PreparedLaunch:
    """The launch that makes one sum, or those of two of the same rank.

    It takes positions and offsets of the routing, and for each sum `out`, `low`, contiguous [P, r] in expert order, and
    `wide`, contiguous [*, J].

    Args:
        config: the call's tiling, from which that of the sums follows.
        P: routed rows.
        s: the scaling.
        first, other: the sums.
    """
    config, names = config.outer(), ("J", "fan", "stride_oe", "stride_or", "stride_oj")
    E, rank, _ = first.out.shape
    mine, others = first.layout, (0, None, 0, 0, 0) if other is None else other.layout
    layouts: dict[str, Any] = dict(zip(names, mine, strict=True))
    layouts |= zip((f"other_{name}" for name in names), others, strict=True)
    columns = triton.cdiv(mine[0], config.BLOCK_N) + triton.cdiv(others[0], config.BLOCK_N)
    return PreparedLaunch(
        grouped_outer_kernel,
        E * columns,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        P=P,
        E=E,
        RANK=rank,
        s=s,
        **layouts,
        BLOCK_R=padded_rank(rank),
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
    )


def grouped_sum(stream: int | None, wide: Tensor, routing: Routing, out: Tensor, fan: int | None) -> None:
    """Fill contiguous `out` [E, J] with the sum of `wide` over each expert's rows; `fan` as in `Outer`."""
    tensors = out, wide, routing.positions, routing.offsets
    _sum(routing.P, *out.shape, fan, kinds(*tensors))(stream, *tensors)


@lru_cache(4096)
def _sum(P: int, E: int, J: int, fan: int | None, alike: Hashable) -> PreparedLaunch:
    return PreparedLaunch(
        grouped_sum_kernel,
        E * triton.cdiv(J, 128),
        num_warps=4,
        num_stages=1,
        P=P,
        J=J,
        fan=fan,
        BLOCK_N=128,
        BLOCK_K=32,
    )
