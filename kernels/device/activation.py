"""The gated activation between an expert's two projections, and its gradient: one pass over memory each way.

    H = R( a · g·σ )                                        g = min(gate, limit), u = min(max(up, −limit), limit)
    dgate = R( (σ + α·(g·σ·(1 − σ))) · a · dH )             where gate ≤ limit, else 0
    dup   = R( g·σ · dH )                                   where |up| ≤ limit, else 0

with a = u + offset and σ = 1 / (1 + e^(−α·g)), all in fp32. The backward pass reads gate_up and computes σ again, so
that nothing else is kept. With e = e^(−|α·g|), which cannot overflow, σ and 1 − σ are 1/(1 + e) and e/(1 + e), or the
other way round: neither loses digits where it is small.

Interleaved columns are read and written as they lie, 16 bytes a thread, and taken apart in registers.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from mxref.kernels.device.launch import PreparedLaunch, kinds, stream_of
from mxref.swiglu import SwiGLU

__all__ = ["COLS", "ROWS", "activate", "activate_backward"]

ROWS, COLS = 16, 128
"""Of H, that one program computes: in 16 bits a thread has 64 bytes of gate_up in flight. 23 × 128 columns waste 2 % of
the lanes on gpt-oss' 2880; more rows, shorter pieces of each."""


@triton.jit
def tile_of(J, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's rows [ROWS, 1], int64, and the first of its columns of H."""
    blocks = tl.cdiv(J, COLS)
    rows = ((tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    return rows[:, None], (tl.program_id(0) % blocks) * COLS


@triton.jit
def load_pairs(gate_up, rows, j0, P, J, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Gate and up at columns j0.. of H, fp32 [ROWS, COLS]; whatever there is outside [P, J]."""
    if INTERLEAVED:
        c = (2 * j0 + tl.arange(0, 2 * COLS))[None, :]
        pairs = tl.load(gate_up + rows * 2 * J + c, mask=(rows < P) & (c < 2 * J))
        gate, up = tl.split(pairs.reshape(ROWS, COLS, 2))
    else:
        j = (j0 + tl.arange(0, COLS))[None, :]
        inside = (rows < P) & (j < J)
        gate = tl.load(gate_up + rows * 2 * J + j, mask=inside)
        up = tl.load(gate_up + rows * 2 * J + J + j, mask=inside)
    return gate.to(tl.float32), up.to(tl.float32)


@triton.jit
def store_pairs(out, gate, up, rows, j0, P, J, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The inverse of `load_pairs`, rounded once."""
    gate, up = gate.to(out.dtype.element_ty), up.to(out.dtype.element_ty)
    if INTERLEAVED:
        c = (2 * j0 + tl.arange(0, 2 * COLS))[None, :]
        pairs = tl.join(gate, up).reshape(ROWS, 2 * COLS)
        tl.store(out + rows * 2 * J + c, pairs, mask=(rows < P) & (c < 2 * J))
    else:
        j = (j0 + tl.arange(0, COLS))[None, :]
        inside = (rows < P) & (j < J)
        tl.store(out + rows * 2 * J + j, gate, mask=inside)
        tl.store(out + rows * 2 * J + J + j, up, mask=inside)


@triton.jit
def clamped(gate, up, limit):
    """g and u; NaN stays, as in torch.clamp."""
    if limit is None:
        return gate, up
    else:
        g = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        return g, tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sigmoids(t):
    """σ(t) and 1 − σ(t)."""
    e = tl.exp(-tl.abs(t))
    larger = 1 / (1 + e)
    smaller = e * larger
    positive = t >= 0
    return tl.where(positive, larger, smaller), tl.where(positive, smaller, larger)


@triton.jit(do_not_specialize=["P"])
def activation_kernel(
    out, gate_up, P, J, alpha, limit, offset, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """One program computes ROWS × COLS elements of H [P, J] from gate_up [P, 2J], both contiguous."""
    rows, j0 = tile_of(J, ROWS, COLS)
    gate, up = load_pairs(gate_up, rows, j0, P, J, INTERLEAVED, ROWS, COLS)
    g, u = clamped(gate, up, limit)
    sigma, _ = sigmoids(alpha * g)
    h = (u + offset) * (g * sigma)
    j = (j0 + tl.arange(0, COLS))[None, :]
    tl.store(out + rows * J + j, h.to(out.dtype.element_ty), mask=(rows < P) & (j < J))


@triton.jit(do_not_specialize=["P"])
def activation_backward_kernel(
    out, gate_up, grad, P, J, alpha, limit, offset, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """One program computes the gradients of ROWS × COLS gates and ups; `grad` is dH [P, J], `out` is [P, 2J]."""
    rows, j0 = tile_of(J, ROWS, COLS)
    gate, up = load_pairs(gate_up, rows, j0, P, J, INTERLEAVED, ROWS, COLS)
    j = (j0 + tl.arange(0, COLS))[None, :]
    dh = tl.load(grad + rows * J + j, mask=(rows < P) & (j < J)).to(tl.float32)
    g, u = clamped(gate, up, limit)
    sigma, rest = sigmoids(alpha * g)
    dgate = (sigma + alpha * (g * sigma * rest)) * (u + offset) * dh
    dup = g * sigma * dh
    if limit is not None:
        dgate = tl.where(g == gate, dgate, 0.0)  # where the clamp changed nothing: at its bound, but not at NaN
        dup = tl.where(u == up, dup, 0.0)
    store_pairs(out, dgate, dup, rows, j0, P, J, INTERLEAVED, ROWS, COLS)


def activate(gate_up: Tensor, form: SwiGLU, out: Tensor) -> Tensor:
    """H of gate_up, contiguous [P, 2J]; `out`, contiguous [P, J], is filled and returned."""
    _prepared(False, *out.shape, form.interleaved, *_numbers(form), kinds(out, gate_up))(stream_of(out), out, gate_up)
    return out


def activate_backward(gate_up: Tensor, grad: Tensor, form: SwiGLU, out: Tensor) -> Tensor:
    """d(gate_up) of dH, contiguous [P, J]; `out`, contiguous [P, 2J], is filled and returned."""
    tensors = out, gate_up, grad
    _prepared(True, *grad.shape, form.interleaved, *_numbers(form), kinds(*tensors))(stream_of(out), *tensors)
    return out


def _numbers(form: SwiGLU) -> tuple[str | None, ...]:
    """Alpha, limit and offset as `float.hex` writes them: numbers as keys would take −0 for 0."""
    return tuple(None if x is None else float(x).hex() for x in (form.alpha, form.limit, form.offset))


@lru_cache(4096)
def _prepared(
    backward: bool, P: int, J: int, interleaved: bool, alpha: str, limit: str | None, offset: str, alike: Hashable
) -> PreparedLaunch:
    return PreparedLaunch(
        activation_backward_kernel if backward else activation_kernel,
        triton.cdiv(P, ROWS) * triton.cdiv(J, COLS),
        num_warps=4,
        num_stages=1,
        P=P,
        J=J,
        alpha=float.fromhex(alpha),
        limit=None if limit is None else float.fromhex(limit),
        offset=float.fromhex(offset),
        INTERLEAVED=interleaved,
        ROWS=ROWS,
        COLS=COLS,
    )
