"""Between routed rows and tokens: the sum over a token's slots and, backwards, each slot's share.

    combine   out[t] = R( Σ_slots gate[t, slot] · rows[row of (t, slot)] )       forward with gates; dX without
    spread    dY[p]  = R( gate[p] · dOut[token of p] ),   dgate[p] = R( ⟨Y[p], dOut[token of p]⟩ )

Slots that a sentinel holds are skipped, not multiplied by zero, so that nothing in a foreign gate can spread.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from mxref.kernels.device.launch import PreparedLaunch
from mxref.kernels.device.schedule import Routing, source_rows

__all__ = ["combine", "spread"]


@triton.jit(do_not_specialize=["tokens", "slots"])
def combine_kernel(out, rows_in, inverse, gates, tokens, slots, J, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program sums the slots, in ascending order in fp32, for BLOCK_T tokens and BLOCK_N columns."""
    blocks = tl.cdiv(J, BLOCK_N)
    t = ((tl.program_id(0) // blocks) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    j = ((tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for slot in range(0, slots):
        row = tl.load(inverse + t * slots + slot, mask=t < tokens, other=-1).to(tl.int64)
        live = row >= 0
        value = tl.load(rows_in + row[:, None] * J + j, mask=live[:, None] & (j < J), other=0).to(tl.float32)
        if gates is not None:
            gate = tl.load(gates + t * slots + slot, mask=live, other=0).to(tl.float32)
            value = gate[:, None] * value
        acc += value
    tl.store(out + t[:, None] * J + j, acc.to(out.dtype.element_ty), mask=(t < tokens)[:, None] & (j < J))


@triton.jit(do_not_specialize=["P", "E", "fan"], do_not_specialize_on_alignment=["positions", "offsets"])
def spread_kernel(
    out,
    dgates,
    source,
    y,
    gates,
    positions,
    offsets,
    P,
    E,
    J,
    fan,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program takes BLOCK_M routed rows in expert order, all columns; of rows that no expert owns only the dgates,
    0, are written."""
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    position, inside = source_rows(rows, rows < P, positions, 1, P)
    live = inside & (rows < tl.load(offsets + E - 1).to(tl.int64))
    dot = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for j0 in range(0, J, BLOCK_N):
        j = (j0 + tl.arange(0, BLOCK_N))[None, :]
        mask = live[:, None] & (j < J)
        value = tl.load(source + (position // fan)[:, None] * J + j, mask=mask, other=0).to(tl.float32)
        if dgates is not None:
            dot += tl.load(y + rows[:, None] * J + j, mask=mask, other=0).to(tl.float32) * value
        if gates is not None:
            value = tl.load(gates + position, mask=live, other=0).to(tl.float32)[:, None] * value
        tl.store(out + rows[:, None] * J + j, value.to(out.dtype.element_ty), mask=mask)
    if dgates is not None:
        tl.store(dgates + position, tl.sum(dot, axis=1).to(dgates.dtype.element_ty), mask=inside)


def combine(stream: int | None, rows_in: Tensor, routing: Routing, out: Tensor, gates: Tensor | None = None) -> Tensor:
    """Sum routed rows [P, J], in expert order, over the slots of each token, gated if `gates` [P] is given.

    `out` [tokens, J] is filled and returned; P / tokens is the number of slots.
    """
    tokens, J = out.shape
    gate_dtype = None if gates is None else gates.dtype
    launch = _combine(routing.P, tokens, J, out.device, out.dtype, rows_in.dtype, gate_dtype)
    launch(stream, out, rows_in, routing.inverse(stream), gates)
    return out


@lru_cache(4096)
def _combine(P: int, tokens: int, J: int, *alike: Hashable) -> PreparedLaunch:
    return PreparedLaunch(
        combine_kernel,
        triton.cdiv(tokens, 16) * triton.cdiv(J, 128),
        num_warps=4,
        num_stages=1,
        tokens=tokens,
        slots=P // max(tokens, 1),
        J=J,
        BLOCK_T=16,
        BLOCK_N=128,
    )


def spread(
    stream: int | None,
    source: Tensor,
    routing: Routing,
    out: Tensor,
    fan: int,
    gates: Tensor | None = None,
    y: Tensor | None = None,
    dgates: Tensor | None = None,
) -> Tensor:
    """Give each routed row, in expert order, its row of `source`, gated if `gates` is given.

    Args:
        stream: the pass's, see `stream_of`.
        source: contiguous [P / fan, J]; a routed row is row position // fan of it.
        routing: positions and offsets.
        out: [P, J], filled and returned; rows that no expert owns are left as they are.
        fan: slots per row of `source`.
        gates: [P] by position.
        y: [P, J] in expert order, the rows that the gates multiplied; read for `dgates`.
        dgates: [P] by position, filled; 0 where no expert owns the row.
    """
    tensors = out, dgates, source, y, gates, routing.positions, routing.offsets
    _spread(
        routing.P, routing.E, out.shape[1], fan, out.device, out.dtype, source.dtype,
        None if gates is None else gates.dtype, None if y is None else y.dtype,
        None if dgates is None else dgates.dtype, routing.positions.dtype, routing.offsets.dtype,
    )(stream, *tensors)  # fmt: skip
    return out


@lru_cache(4096)
def _spread(P: int, E: int, J: int, fan: int, *alike: Hashable) -> PreparedLaunch:
    return PreparedLaunch(
        spread_kernel,
        triton.cdiv(P, 16),
        num_warps=4,
        num_stages=1,
        P=P,
        E=E,
        J=J,
        fan=fan,
        BLOCK_M=16,
        BLOCK_N=128,
    )
