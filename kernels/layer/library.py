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

from mxref.kernels.device.launch import compute_dtype, passed_on
from mxref.kernels.device.schedule import Routing
from mxref.kernels.layer.autograd import parallel_linear_lora
from mxref.kernels.layer.operands import frozen_weights
from mxref.kernels.layer.passes import Call, gradients
from mxref.kernels.layer.plan import Needs
from mxref.weights import MXLayout

__all__ = ["expert_linear"]

_OPERANDS = """Tensor x, Tensor weight, Tensor? scales, SymInt k, Tensor sorted_expert_idxs,
    Tensor sorted_scattered_idxs, Tensor expert_offsets, Tensor? lora_A, Tensor? lora_B, float scaling,
    Tensor? expert_biases, Tensor? gates, bool grouped_in, bool grouped_out, bool use_fused_dX, bool use_fused_gather,
    int layout=0, bool scales_to_128=False"""
"""The operators' arguments: those of `parallel_linear_lora`, packed weights as two tensors and what they are beside."""

_PLACES = (0, 7, 8, 10, 11)
"""Where the operands of `Needs` are among them."""


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
    *,
    layout: MXLayout = MXLayout.FWD,
    scales_to_128: bool = False,
    routing: Routing | None = None,
) -> Tensor:
    """`parallel_linear_lora` over plain tensors, eager or compiled, with the same bits; shapes alone without data.

    Args:
        x: as `inputs` there.
        weight: packed codes uint8 [E, N, K/2] beside `scales`, or dense [E, K, N] without.
        scales: uint8 [E, N, K/32], or None.
        k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets: as there.
        lora_A, lora_B, scaling, expert_biases, gates: as there.
        grouped_in, grouped_out, use_fused_dX, use_fused_gather: as there.
        layout, scales_to_128: of packed weights, see `MXWeights`.
        routing: as there; a compiled graph, which carries tensors alone, makes its own.
    """
    operands = (
        k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets, lora_A, lora_B, scaling, expert_biases, gates,
        grouped_in, grouped_out, use_fused_dX, use_fused_gather,
    )  # fmt: skip
    if passed_on(x):
        out: Tensor = scattermoe_lora(x, weight, scales, *operands, int(layout), scales_to_128)[0]
        return out
    return parallel_linear_lora(x, frozen_weights(weight, scales, layout, scales_to_128), *operands, routing=routing)


@torch.library.custom_op("mxref::scattermoe_lora", mutates_args=(), schema=f"({_OPERANDS}) -> (Tensor, Tensor, Tensor)")
def scattermoe_lora(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's output; Z, or [0] without adapters; Y in expert order, or [0] without gates."""
    out, z, y = _call(operands).forward()
    gates = operands[_PLACES[-1]]
    return out, out.new_empty(0) if z is None else z, out.new_empty(0) if gates is None else y


@scattermoe_lora.register_fake
def _(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, scales, _, experts, _, offsets, A, _, _, _, gates = operands[:12]
    P, N = experts.shape[0], weight.shape[2] if scales is None else weight.shape[1]
    out = x.new_empty(P if gates is None else gates.shape[0], N, dtype=compute_dtype(x.dtype))
    z = out.new_empty(0) if A is None else out.new_empty(P, A.shape[0] // offsets.shape[0])
    return out, z, out.new_empty(0) if gates is None else out.new_empty(P, N)


@torch.library.custom_op(
    "mxref::scattermoe_lora_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor z, Tensor y, bool[] needs, {_OPERANDS}) -> Tensor[]",
)
def scattermoe_lora_backward(grad_out: Tensor, z: Tensor, y: Tensor, needs: list[bool], *operands: Any) -> list[Tensor]:
    """Gradients of x, A, B, biases and gates, in the operands' own dtypes; [0] in the place of one not needed.

    z and y are the forward operator's; y may be [0] if the gates' gradient is not needed.
    """
    given = [operands[place] for place in _PLACES]
    needed = Needs(*(need and operand is not None for need, operand in zip(needs, given, strict=True)))
    call = _call(operands)
    found = gradients(call.plan, needed, call.saved(needed, z, y), call.routing, grad_out)
    return [
        grad_out.new_empty(0) if gradient is None else gradient.to(operand.dtype)
        for gradient, operand in zip(found, given, strict=True)
    ]


@scattermoe_lora_backward.register_fake
def _(grad_out: Tensor, z: Tensor, y: Tensor, needs: list[bool], *operands: Any) -> list[Tensor]:
    given = [operands[place] for place in _PLACES]
    return [
        grad_out.new_empty(0) if operand is None or not need else operand.new_empty(operand.shape)
        for need, operand in zip(needs, given, strict=True)
    ]


def _call(operands: tuple[Any, ...]) -> Call:
    x, weight, scales, *others = operands[:14]
    use_fused_dX, use_fused_gather, *stored = operands[14:]  # torch leaves out what is as by default
    return Call.of((x, frozen_weights(weight, scales, *stored), *others), use_fused_dX, use_fused_gather)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, z, y = output
    ctx.mark_non_differentiable(z, y)
    kept = y if ctx.needs_input_grad[_PLACES[-1]] else y.new_empty(0)
    tensors = {i: value for i, value in enumerate(inputs) if isinstance(value, Tensor)}
    ctx.places = tuple(tensors)
    ctx.save_for_backward(z, kept, *tensors.values())
    ctx.others = {i: value for i, value in enumerate(inputs) if i not in tensors}


def _backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    z, y, *tensors = ctx.saved_tensors
    by_place = {**dict(zip(ctx.places, tensors, strict=True)), **ctx.others}
    needs = [bool(ctx.needs_input_grad[place]) for place in _PLACES]
    found = scattermoe_lora_backward(grad_out, z, y, needs, *(by_place[i] for i in range(len(by_place))))
    needed = {place: gradient for place, need, gradient in zip(_PLACES, needs, found, strict=True) if need}
    return tuple(needed.get(i) for i in range(len(by_place)))


scattermoe_lora.register_autograd(_backward, setup_context=_setup)
