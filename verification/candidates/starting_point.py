"""The layer in plain PyTorch, to start a kernel of your own from: `mxref new-kernel FILE` writes a copy.

    mxref gate --kernel my_kernel.py:layer        # judge it, on a CPU as on a GPU
    pytest test_my_kernel.py                      # one small problem, by the gate

Every rounding point of the contract is here, and autograd makes the gradients. Replace it piece by piece; what the
replacement does not support, declare: `layer.mxref_covers = "gates=none, rank>=16"`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mxref import MXWeights, decode_mxfp4


class _Round(torch.autograd.Function):
    """`scale` times x rounded to `to`; its gradient rounded to `back`, then times `scale`. None: not rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to: torch.dtype | None, back: torch.dtype | None, scale: float = 1.0) -> Tensor:
        ctx.back, ctx.scale = back, scale
        return scale * (x if to is None else x.to(to).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rounded = grad if ctx.back is None else grad.to(ctx.back).to(grad.dtype)
        return ctx.scale * rounded, None, None, None


class _Product(torch.autograd.Function):
    """a·b, and backwards its two products, in fp32 even where the caller's autocast is active then."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (a, b), (of_a, of_b) = ctx.saved_tensors, ctx.needs_input_grad
        with torch.autocast(grad.device.type, enabled=False):
            return grad @ b.T if of_a else None, a.T @ grad if of_b else None


_round: Callable[..., Tensor] = _Round.apply
_product: Callable[..., Tensor] = _Product.apply


def layer(
    inputs: Tensor,  # x: [M, K], or [P, K] in expert order with grouped_in; P = M·k routed rows
    expert_weights: Tensor | MXWeights,  # packed: 2 codes a byte, even k in the low nibble; or dense [E, K, N]
    k: int,  # rows that each input row feeds
    sorted_expert_idxs: Tensor,  # [P], ascending; E and above: another rank owns the row
    sorted_scattered_idxs: Tensor,  # [P], position token·k + slot of each row
    expert_offsets: Tensor,  # [E], inclusive cumulative counts
    lora_A: Tensor | None = None,  # [E·r, K], expert e owns rows e·r to (e + 1)·r
    lora_B: Tensor | None = None,  # [N, E·r], expert e owns those columns
    scaling: float = 1.0,
    expert_biases: Tensor | None = None,  # [E, N]
    gates: Tensor | None = None,  # [T, g] with T·g = P: the output is summed over a token's slots
    grouped_in: bool = False,
    grouped_out: bool = False,
    use_fused_dX: bool = False,
    use_fused_gather: bool = False,
) -> Tensor:
    """Y [P, N] by position, or in expert order with `grouped_out`; with `gates` [T, N]. Dtype: that of `inputs`.

    Y = R(x·W + s·R(x·Aᵀ)·Bᵀ + bias) for each routed row, R one rounding to the activation dtype, sums in fp32.
    """
    with torch.autocast(inputs.device.type, enabled=False):  # results do not depend on the caller's autocast
        dtype, E, positions = inputs.dtype, expert_offsets.numel(), sorted_scattered_idxs.long()
        if isinstance(expert_weights, MXWeights):
            W = decode_mxfp4(expert_weights, dtype).mT.float()
        else:
            W = expert_weights.float()
        rows = inputs.float() if grouped_in else inputs.float()[positions // k]
        rows = _round(rows, None, dtype)  # D, the gradient of each routed row, is rounded before it is summed to dX
        outputs = []
        for e, (start, end) in enumerate(pairwise([0, *expert_offsets.tolist()])):
            x = rows[start:end]
            y = _product(x, W[e])
            if lora_A is not None and lora_B is not None:
                r = lora_A.shape[0] // E
                own = slice(e * r, (e + 1) * r)
                A, B = _round(lora_A[own].float(), dtype, None), _round(lora_B[:, own].float(), dtype, None)
                # s·Z; V, its gradient, is rounded before s too
                z = _round(_product(x, A.T), dtype, dtype, float(scaling))
                y = y + _product(z, B.T)
            if expert_biases is not None:
                y = y + expert_biases[e].float()
            outputs.append(y)
        remote = sorted_expert_idxs >= E
        y = torch.cat([*outputs, rows.new_zeros(int(remote.sum()), W.shape[2])])  # rows of other ranks are zero
        if grouped_out:
            return y.to(dtype)
        order = torch.argsort(positions)
        y = y[order]
        if gates is None:
            return y.to(dtype)
        weights = _round(gates.float(), dtype, None).masked_fill(remote[order].view(gates.shape), 0.0)
        slots = _round(y, dtype, dtype).view(*gates.shape, W.shape[2])
        return (weights[..., None] * slots).sum(1).to(dtype)
