"""The layer as `torch.library` operators, so that `torch.compile` passes over it without a graph break.

    mxref::scattermoe_lora            forward; opaque to the compiler, with a fake and an autograd registration
    mxref::scattermoe_lora_backward   its gradients

The bits are those of the eager layer, and so is the work: compiled graphs carry tensors, so the forward operator also
returns what its backward reads, Z and (with gates) Y. Eager calls do not come here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from mxref.kernels.device.launch import compute_dtype
from mxref.kernels.layer.autograd import Prepared, ScatterMoELoRA, parallel_linear_lora
from mxref.problem import Problem
from mxref.weights import MXWeights

__all__ = ["expert_linear"]

_INPUTS, _LORA_A, _LORA_B, _BIASES, _GATES = 0, 6, 7, 9, 10
"""Places of the differentiable operands among the arguments of `ScatterMoELoRA`."""

_OPERANDS = (0, 7, 8, 10, 11)
"""The same among the operators' arguments: x, A, B, biases and gates."""


def expert_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    k: int,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    expert_biases: Tensor | None = None,
    gates: Tensor | None = None,
    grouped_in: bool = False,
    grouped_out: bool = False,
    use_fused_dX: bool = False,
    use_fused_gather: bool = False,
) -> Tensor:
    """`parallel_linear_lora` over plain tensors, eager or compiled, with the same bits; shapes alone without data.

    Args:
        x: as `inputs` there.
        weight: packed codes uint8 [E, N, K/2] beside `scales`, or dense [E, K, N] without.
        scales: uint8 [E, N, K/32], or None.
        k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets: as there.
        lora_A, lora_B, scaling, expert_biases, gates: as there.
        grouped_in, grouped_out, use_fused_dX, use_fused_gather: as there.
    """
    order = (sorted_expert_idxs, sorted_scattered_idxs, expert_offsets)
    extras: tuple[Any, ...] = (
        lora_A,
        lora_B,
        scaling,
        expert_biases,
        gates,
        grouped_in,
        grouped_out,
        use_fused_dX,
        use_fused_gather,
    )
    if torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor):
        out: Tensor = scattermoe_lora(x, weight, scales, k, *order, *extras)[0]
        return out
    return parallel_linear_lora(x, _weights(weight, scales), k, *order, *extras)


@torch.library.custom_op("mxref::scattermoe_lora", mutates_args=())
def scattermoe_lora(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    k: int,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    expert_biases: Tensor | None,
    gates: Tensor | None,
    grouped_in: bool,
    grouped_out: bool,
    use_fused_dX: bool,
    use_fused_gather: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's output, see `expert_linear`; Z [P, r]; and with gates Y [P, N]. [0] in the place of what is not."""
    problem = Problem(
        x,
        _weights(weight, scales),
        k,
        sorted_expert_idxs,
        sorted_scattered_idxs,
        expert_offsets,
        lora_A,
        lora_B,
        scaling,
        expert_biases,
        gates,
        grouped_in,
        grouped_out,
    )
    out, z, y = Prepared.of(problem, use_fused_dX, use_fused_gather).forward()
    return out, out.new_empty(0) if z is None else z, out.new_empty(0) if gates is None else y


@scattermoe_lora.register_fake
def _(x, weight, scales, k, experts, positions, offsets, A, B, scaling, bias, gates, *flags):
    P, N = experts.shape[0], weight.shape[2] if scales is None else weight.shape[1]
    dtype = compute_dtype(x.dtype)
    out = x.new_empty(P if gates is None else gates.shape[0], N, dtype=dtype)
    z = out.new_empty(0) if A is None else out.new_empty(P, A.shape[0] // offsets.shape[0])
    return out, z, out.new_empty(0) if gates is None else out.new_empty(P, N)


@torch.library.custom_op("mxref::scattermoe_lora_backward", mutates_args=())
def scattermoe_lora_backward(
    grad_out: Tensor,
    z: Tensor,
    y: Tensor,
    needs: list[bool],
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    k: int,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    expert_biases: Tensor | None,
    gates: Tensor | None,
    grouped_in: bool,
    grouped_out: bool,
    use_fused_dX: bool,
    use_fused_gather: bool,
) -> list[Tensor]:
    """Gradients of x, A, B, biases and gates, in the operands' own dtypes; [0] in the place of one not needed.

    z and y are the forward operator's; y may be [0] if the gates' gradient is not needed.
    """
    operands = {_INPUTS: x, _LORA_A: lora_A, _LORA_B: lora_B, _BIASES: expert_biases, _GATES: gates}
    needed = [need and operand is not None for need, operand in zip(needs, operands.values(), strict=True)]
    problem = Problem(
        x,
        _weights(weight, scales),
        k,
        sorted_expert_idxs,
        sorted_scattered_idxs,
        expert_offsets,
        lora_A,
        lora_B,
        scaling,
        expert_biases,
        gates,
        grouped_in,
        grouped_out,
    )
    prepared = Prepared.of(problem, use_fused_dX, use_fused_gather)
    tape = _Tape(needed, prepared.call, prepared.saved(z, y))
    found = ScatterMoELoRA.backward(tape, grad_out)
    gradients = []
    for place, operand in operands.items():
        gradient = found[place]
        if operand is None or gradient is None or not tape.needs_input_grad[place]:
            gradients.append(x.new_empty(0))
        else:
            gradients.append(gradient.to(operand.dtype).clone(memory_format=torch.contiguous_format))
    return gradients


@scattermoe_lora_backward.register_fake
def _(grad, z, y, needs, x, weight, scales, k, experts, positions, offsets, A, B, scaling, bias, gates, *flags):
    operands = zip((x, A, B, bias, gates), needs, strict=True)
    return [
        x.new_empty(0) if operand is None or not needed else operand.new_empty(operand.shape)
        for operand, needed in operands
    ]


class _Tape:
    """What `ScatterMoELoRA.backward` needs of an autograd context."""

    def __init__(self, needs: list[bool], call: Any, saved: tuple[Tensor | None, ...]):
        wanted = dict(zip((_INPUTS, _LORA_A, _LORA_B, _BIASES, _GATES), needs, strict=True))
        self.needs_input_grad = tuple(wanted.get(place, False) for place in range(17))
        self.saved_tensors, self.call = saved, call


def _weights(weight: Tensor, scales: Tensor | None) -> Tensor | MXWeights:
    if scales is None:
        return weight
    return MXWeights(weight, scales, 2 * weight.shape[2], weight.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, z, y = output
    ctx.mark_non_differentiable(z, y)
    kept = y if ctx.needs_input_grad[_OPERANDS[-1]] else y.new_empty(0)
    tensors = {i: value for i, value in enumerate(inputs) if isinstance(value, Tensor)}
    ctx.places = tuple(tensors)
    ctx.save_for_backward(z, kept, *tensors.values())
    ctx.others = {i: value for i, value in enumerate(inputs) if i not in tensors}
    ctx.count = len(inputs)


def _backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    z, y, *tensors = ctx.saved_tensors
    by_place = {**dict(zip(ctx.places, tensors, strict=True)), **ctx.others}
    inputs = [by_place[i] for i in range(ctx.count)]
    needs = [bool(ctx.needs_input_grad[i]) for i in _OPERANDS]
    found = scattermoe_lora_backward(grad_out, z, y, needs, *inputs)
    gradients: list[Tensor | None] = [None] * ctx.count
    for i, needed, gradient in zip(_OPERANDS, needs, found, strict=True):
        gradients[i] = gradient if needed else None
    return tuple(gradients)


scattermoe_lora.register_autograd(_backward, setup_context=_setup)
