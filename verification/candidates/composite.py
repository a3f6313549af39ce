"""The layer in plain PyTorch: an independent implementation to hold beside the golden model and the kernels.

Decode, then one fp32 matrix product an expert; every rounding point of the contract is in place, and the gradients are
autograd's own, not written by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.weights import MXWeights, decode_mxfp4

__all__ = ["composite"]


class _Round(torch.autograd.Function):
    """`scale` times the value rounded to one dtype; its gradient rounded to another, then scaled; None: not rounded."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, to: torch.dtype | None, gradient_to: torch.dtype | None, scale: float = 1.0
    ) -> Tensor:
        ctx.gradient_to, ctx.scale = gradient_to, scale
        return scale * (x if to is None else x.to(to).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rounded = grad if ctx.gradient_to is None else grad.to(ctx.gradient_to).to(grad.dtype)
        return ctx.scale * rounded, None, None, None


def composite(*, use_fused_dX: bool = False, use_fused_gather: bool = False, **operands: Any) -> Tensor:
    """The layer with the keywords of `mxref.parallel_linear_lora`, differentiable by autograd; autocast is ignored.

    Raises:
        TypeError, ValueError: as `Problem.validate`.
    """
    problem = Problem(**operands)
    problem.validate(check_values=False)
    with torch.autocast(problem.device.type, enabled=False):  # a function's dtypes are its operands'
        return _layer(problem)


def _layer(problem: Problem) -> Tensor:
    A, B, gates, weights = problem.lora_A, problem.lora_B, problem.gates, problem.expert_weights
    dtype, wide = problem.dtype, torch.promote_types(problem.dtype, torch.float32)
    R: Callable[..., Tensor] = _Round.apply
    dense = decode_mxfp4(weights, dtype).transpose(1, 2) if isinstance(weights, MXWeights) else weights
    rows = R(problem.inputs.to(wide)[problem.row_sources()], None, dtype)
    outputs = []
    # Experts without rows take part too: their parameters then belong to the graph and get exact zeros.
    for e, (start, end) in enumerate(pairwise([0, *problem.expert_offsets.tolist()])):
        x = rows[start:end]
        y = x @ dense[e].to(wide)
        if A is not None and B is not None:
            own = slice(e * problem.rank, (e + 1) * problem.rank)
            A_e, B_e = R(A[own].to(wide), dtype, None), R(B[:, own].to(wide), dtype, None)
            y = y + R(x @ A_e.T, dtype, dtype, problem.scaling) @ B_e.T
        if problem.expert_biases is not None:
            y = y + problem.expert_biases[e].to(wide)
        outputs.append(y)
    sentinel = problem.sorted_expert_idxs >= problem.E
    grouped = torch.cat([*outputs, rows.new_zeros(int(sentinel.sum()), problem.N)])
    if problem.grouped_out:
        return grouped.to(dtype)
    by_position = torch.argsort(problem.row_positions())
    y = grouped[by_position]
    if gates is None:
        return y.to(dtype)
    slot_gates = R(gates.to(wide), dtype, None).masked_fill(sentinel[by_position].view(gates.shape), 0.0)
    slots = R(y, dtype, dtype).view(*gates.shape, problem.N)
    return (slot_gates[..., None] * slots).sum(1).to(dtype)
