"""The differentiable layer: `ScatterMoELoRA` and its functional front `parallel_linear_lora`.

For expert e with frozen weights W, adapters A and B, scaling s, and R one rounding to the activation dtype:

    forward     Z = R(x·Aᵀ)         Y = R(s·Z·Bᵀ + x·W + bias)         out = R(Σ_slots gate·Y)
    backward    dgate = R(⟨Y, dOut⟩)   dY = R(gate·dOut)               V = R(dY·B)
                D = R(s·V·A + dY·Wᵀ)   dX = R(Σ_slots D)
                dA = R(s·Vᵀ·x)         dB = R(s·dYᵀ·Z)                 dbias = R(Σ_rows dY)

Z and V are computed once per routed row, and Z is kept. A, B and the gates are rounded to the activation dtype
before use; a parameter's gradient is rounded once, to the parameter's own dtype.

What the backward pass reads is saved as autograd saves tensors: if it was changed in place between the passes backward
raises, unless the forward copied it, and a checkpointed region lets it go.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mxref.kernels.device.configs import Config
from mxref.kernels.device.schedule import Routing
from mxref.kernels.layer.passes import Call, Saved, gradients
from mxref.kernels.layer.plan import Needs
from mxref.weights import MXWeights

__all__ = ["ScatterMoELoRA", "parallel_linear_lora"]

_SAVED = len(Saved._fields)

_differentiable = itemgetter(0, 6, 7, 9, 10)
"""The operands of `Needs` among the arguments of `parallel_linear_lora`."""


def parallel_linear_lora(
    inputs: Tensor,
    expert_weights: Tensor | MXWeights,
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
    validate: bool = False,
    config: Config | None = None,
    routing: Routing | None = None,
) -> Tensor:
    """Every routed row times its expert's frozen weights plus its adapter, on Triton kernels, differentiable.

    M tokens, k slots a token, P = M·k routed rows, E experts, LoRA rank r from 1 to 128.

    Args:
        inputs: x, bf16, fp16 or fp32 [M, K], or [P, K] in expert order with `grouped_in` (then k = 1).
        expert_weights: packed `MXWeights`, or dense [E, K, N] of the activation dtype, any strides.
        k: rows of the output that each input row feeds.
        sorted_expert_idxs: integer [P], ascending; ids ≥ E are sentinels, whose output rows are zero.
        sorted_scattered_idxs: integer [P], position token·k + slot of each row.
        expert_offsets: integer [E], inclusive cumulative counts.
        lora_A: [E·r, K], expert e owns rows e·r..(e+1)·r.
        lora_B: [N, E·r], expert e owns those columns.
        scaling: s.
        expert_biases: [E, N].
        gates: [T, g] with T·g = P; the output is then summed over slots to [T, N].
        grouped_in: the inputs are already in expert order.
        grouped_out: leave the output in expert order.
        use_fused_dX: decode packed weights inside dX's kernel. False leaves the choice to the tiling: with the kernel
            for Hopper that is the same, elsewhere the active experts are decoded first (Strategy A).
        use_fused_gather: read dOut's rows through their positions. False likewise: elsewhere they are gathered to
            expert order first.
        validate: also check the index tensors' values on a GPU, which synchronises; on CPU they always are.
        config: pin the tiling, and with it each row's bits whatever the batch.
        routing: `Routing(sorted_scattered_idxs, expert_offsets)`, whose tables then serve every call that is given it,
            such as both projections of a block. The index tensors must be as they were when it was first used.

    Returns:
        [P, N] by position, or in expert order with `grouped_out`, or [T, N] with `gates`; of the activation dtype
        (fp32 under Triton's interpreter, where no rounding point applies).

    Raises:
        TypeError: an operand has a wrong type or dtype.
        ValueError: an operand does not fit the others, or the weights require a gradient.
        RuntimeError: no kernel can run on the operands' device.
    """
    out = ScatterMoELoRA.apply(
        inputs, expert_weights, k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets, lora_A, lora_B, scaling,
        expert_biases, gates, grouped_in, grouped_out, use_fused_dX, use_fused_gather, validate, config, routing,
    )  # fmt: skip
    return cast(Tensor, out)


class ScatterMoELoRA(torch.autograd.Function):
    """The layer as an autograd function: gradients for x, A, B, biases and gates, each only if asked for."""

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """The arguments of `parallel_linear_lora` in its order; the last three may be left out.

        Autograd itself is given those that may need a gradient, since each one that it looks at costs time. So does
        torch's own `apply`, which does something where functions are transformed alone: to refuse it.
        """
        transformed = torch._C._are_functorch_transforms_active()
        apply = super().apply if transformed else super(torch.autograd.Function, cls).apply  # type: ignore[misc]
        return apply(*_differentiable(arguments), arguments)

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """The operands of `Needs`, and all arguments."""
        every = arguments[-1]
        call = Call.of(every[:13], *every[13:])
        needs = Needs._make(ctx.needs_input_grad[:-1])
        out, z, y = call.forward()
        ctx.call = call.plan, needs, tuple(call.routing.tables)
        ctx.save_for_backward(*call.saved(needs, z, y), *call.routing.tables.values())
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """dOut to the gradients that are needed; nothing saved is changed."""
        # `once_differentiable` costs time, and does something only where a second derivative may be asked for.
        return (_differentiated_once if torch.is_grad_enabled() else _backward)(ctx, grad_out)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    plan, needs, heights = ctx.call
    tensors = ctx.saved_tensors
    saved = Saved._make(tensors[:_SAVED])
    tables = dict(zip(heights, tensors[_SAVED:], strict=True))
    routing = Routing(saved.positions, saved.offsets, tables)
    return *gradients(plan, needs, saved, routing, grad_out), None


_differentiated_once = once_differentiable(_backward)
