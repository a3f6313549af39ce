"""The golden gated activation: H = R(act), and its gradient by hand; see `mxref.swiglu` for the formula.

With g, u and σ of the saved gate_up, and R one rounding to the activation dtype:

    forward     H = R( (u + offset) · g·σ )
    backward    dgate = R( dH · (u + offset) · (σ + alpha · g·σ · (1 − σ)) )   where gate ≤ limit, else 0
                dup   = R( dH · g·σ )                                          where |up| ≤ limit, else 0

All in between is exact here (fp64) and fp32 in an implementation. At its bound a clamp lets the gradient through, and
beyond it, or at NaN, nothing, which is what torch.clamp's derivative does. transformers' eager modules round every
elementwise step to the activation dtype instead: five times on the way to gpt-oss' H (u + 1, alpha·g, its sigmoid, g·σ
and their product), twice on the way to SiLU(gate)·up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mxref.rounding import round_to
from mxref.swiglu import SwiGLU

__all__ = ["columns", "exact_gradient", "exact_hidden", "gated", "halves"]


def gated(gate_up: Tensor, form: SwiGLU) -> Tensor:
    """H = R(act), differentiable once: gate_up [.., 2I] -> [.., I] in its dtype (bf16, fp16, fp32 or fp64).

    Raises:
        TypeError, ValueError: see `SwiGLU.check`.
    """
    form.check(gate_up)
    out: Tensor = _Gated.apply(gate_up, form.for_dtype(gate_up.dtype))  # type: ignore[no-untyped-call]
    return out


class _Gated(torch.autograd.Function):
    """Keeps gate_up, and nothing else."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, form: SwiGLU) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.form = form
        return _rounded(exact_hidden(gate_up.double(), form), gate_up.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        return _rounded(exact_gradient(gate_up.double(), grad.double(), ctx.form), gate_up.dtype), None


def exact_hidden(gate_up: Tensor, form: SwiGLU) -> Tensor:
    """H before its rounding: fp64 [.., 2I] -> fp64 [.., I]."""
    gate, up = halves(gate_up, form)
    if form.limit is not None:
        gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
    return (up + form.offset) * (gate * torch.sigmoid(form.alpha * gate))


def exact_gradient(gate_up: Tensor, grad: Tensor, form: SwiGLU) -> Tensor:
    """d(gate_up) before its rounding: fp64 [.., 2I] and dH, fp64 [.., I] -> fp64 [.., 2I]."""
    gate, up = g, u = halves(gate_up, form)
    if form.limit is not None:
        g, u = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
    sigma, rest = torch.sigmoid(form.alpha * g), torch.sigmoid(-form.alpha * g)
    dgate = grad * (u + form.offset) * (sigma + form.alpha * (g * sigma * rest))
    dup = grad * (g * sigma)
    if form.limit is not None:
        dgate = torch.where(gate <= form.limit, dgate, 0.0)
        dup = torch.where((up >= -form.limit) & (up <= form.limit), dup, 0.0)
    return columns(dgate, dup, form)


def halves(gate_up: Tensor, form: SwiGLU) -> tuple[Tensor, Tensor]:
    """Gate and up, both [.., I], as the form lays them out."""
    if form.interleaved:
        return gate_up[..., 0::2], gate_up[..., 1::2]
    gate, up = gate_up.chunk(2, dim=-1)
    return gate, up


def columns(gate: Tensor, up: Tensor, form: SwiGLU) -> Tensor:
    """The inverse of `halves`."""
    return torch.stack((gate, up), -1).flatten(-2) if form.interleaved else torch.cat((gate, up), -1)


def _rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    return round_to(exact, dtype).to(dtype)
