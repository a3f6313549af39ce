"""The golden layer for callers: `ScatterMoELoRA` and `parallel_linear_lora`, signatures as in `mxref.kernels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxref import scattermoe
from mxref.problem import Problem
from mxref.scattermoe import RoundingPoints
from mxref.subnormals import warn_if_flushed
from mxref.weights import MXWeights


class ScatterMoELoRA(torch.autograd.Function):
    """The golden forward and its hand-written backward as one autograd function; see `parallel_linear_lora`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """The arguments of `parallel_linear_lora` in its order, then `mode`; the last three may be left out."""
        problem = Problem(*arguments[:13])
        mode = arguments[15] if len(arguments) > 15 else "contract"
        ctx.points = RoundingPoints.exact() if mode == "exact" else RoundingPoints.contract(problem.dtype)
        ctx.save_for_backward(*_tensors(problem))
        weights = problem.expert_weights
        rebuild = weights.rebuild if isinstance(weights, MXWeights) else None
        ctx.without_tensors = rebuild, problem.k, problem.scaling, problem.grouped_in, problem.grouped_out
        out = scattermoe.forward(problem, ctx.points).out.value
        return out if mode == "exact" else out.to(problem.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, lora_A, lora_B, expert_biases and gates, each in its parameter's dtype."""
        problem = _problem(ctx.saved_tensors, *ctx.without_tensors)
        fwd = scattermoe.forward(problem, ctx.points)
        grads = scattermoe.backward(problem, fwd, grad_out, ctx.points)
        by_place = {
            0: (grads.dx, problem.inputs),
            6: (grads.dA, problem.lora_A),
            7: (grads.dB, problem.lora_B),
            9: (grads.dbias, problem.expert_biases),
            10: (grads.dgates, problem.gates),
        }
        found = {
            place: point.value.to(operand.dtype)
            for place, (point, operand) in by_place.items()
            if point is not None and operand is not None
        }
        return tuple(found.get(place) for place in range(len(ctx.needs_input_grad)))


def _tensors(problem: Problem) -> tuple[Tensor | None, ...]:
    """Every tensor of a problem, packed weights as three, so that autograd keeps them: `_problem` is the inverse."""
    weights = problem.expert_weights
    packed: tuple[Tensor | None, ...]
    if isinstance(weights, MXWeights):
        packed = weights.packed, weights.scales, weights.stored
    else:
        packed = weights, None, None
    routing = (problem.sorted_expert_idxs, problem.sorted_scattered_idxs, problem.expert_offsets)
    return problem.inputs, *packed, *routing, problem.lora_A, problem.lora_B, problem.expert_biases, problem.gates


def _problem(
    tensors: tuple[Any, ...], rebuild: Any, k: int, scaling: float, grouped_in: bool, grouped_out: bool
) -> Problem:
    x, weight, scales, stored, experts, positions, offsets, A, B, biases, gates = tensors
    weights = weight if scales is None else rebuild(weight, scales, stored)
    return Problem(x, weights, k, experts, positions, offsets, A, B, scaling, biases, gates, grouped_in, grouped_out)


def parallel_linear_lora(
    inputs: Tensor,
    expert_weights: Any,
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
    mode: str = "contract",
    validate: bool = True,
) -> Tensor:
    """Golden ScatterMoE-LoRA linear layer: per routed row x·W_e + s·(x·A_eᵀ)·B_eᵀ + bias_e, differentiable.

    Shapes and dtypes are those of `Problem`. The gradient reaches inputs, lora_A, lora_B, expert_biases and gates; the
    base weights are frozen.

    Args:
        inputs: x, [M, K] or, with `grouped_in`, [P, K]; see `Problem` for it and the operands that follow.
        expert_weights: `MXWeights`, or dense [E, K, N] in the activation dtype.
        k: routed rows fed by each input row.
        sorted_expert_idxs: [P], from `flatten_sort_count`, as the next two.
        sorted_scattered_idxs: [P].
        expert_offsets: [E].
        lora_A: [E·r, K].
        lora_B: [N, E·r].
        scaling: s.
        expert_biases: [E, N].
        gates: [T, g], T·g = P.
        grouped_in: inputs are in expert order (k = 1).
        grouped_out: leave the output in expert order.
        use_fused_dX: chooses kernels in production; no effect on values.
        use_fused_gather: as `use_fused_dX`.
        mode: "contract" rounds at every rounding point and returns the activation dtype; "exact" rounds nowhere and
            returns fp64.
        validate: also check the index tensors' values.

    Returns:
        [P, N] by position, or in expert order with `grouped_out`; [T, N] with gates.

    Raises:
        TypeError: an operand has a wrong type or dtype.
        ValueError: an operand has a wrong shape, device or value, or `mode` is unknown.
    """
    if mode not in ("contract", "exact"):
        raise ValueError(f"mode is {mode!r}; expected 'contract' or 'exact'")
    if isinstance(expert_weights, MXWeights):
        warn_if_flushed(expert_weights.device)
    operands = (
        inputs, expert_weights, k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets, lora_A, lora_B, scaling,
        expert_biases, gates, grouped_in, grouped_out,
    )  # fmt: skip
    Problem(*operands).validate(check_values=validate)
    out: Tensor = ScatterMoELoRA.apply(  # type: ignore[no-untyped-call]
        *operands, use_fused_dX, use_fused_gather, mode
    )
    return out
