"""The differentiable layer: `ScatterMoELoRA` and its functional front `parallel_linear_lora`.

For expert e with frozen weights W, adapters A and B, scaling s, and R one rounding to the activation dtype:

    forward     Z = R(x·Aᵀ)         Y = R(s·Z·Bᵀ + x·W + bias)         out = R(Σ_slots gate·Y)
    backward    dgate = R(⟨Y, dOut⟩)   dY = R(gate·dOut)               V = R(dY·B)
                D = R(s·V·A + dY·Wᵀ)   dX = R(Σ_slots D)
                dA = R(s·Vᵀ·x)         dB = R(s·dYᵀ·Z)                 dbias = R(Σ_rows dY)

Z and V are computed once per routed row, and Z is kept. A, B and the gates are rounded to the activation dtype
before use; a parameter's gradient is rounded once, to the parameter's own dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mxref.kernels.device.configs import Config
from mxref.kernels.device.dequant import active_or_sentinel, dequantize_experts
from mxref.kernels.device.grouped_matmul import LowRank, PackedMatrix, grouped_matmul
from mxref.kernels.device.grouped_outer import grouped_outer, grouped_sum
from mxref.kernels.device.launch import compute_dtype
from mxref.kernels.device.schedule import Routing
from mxref.kernels.device.slots import combine, spread
from mxref.kernels.layer.operands import Adapter, check_problem, operand, routing_of
from mxref.problem import Problem
from mxref.weights import MXWeights

__all__ = ["Prepared", "ScatterMoELoRA", "parallel_linear_lora"]


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

    Returns:
        [P, N] by position, or in expert order with `grouped_out`, or [T, N] with `gates`; of the activation dtype
        (fp32 under Triton's interpreter, where no rounding point applies).

    Raises:
        TypeError: an operand has a wrong type or dtype.
        ValueError: an operand does not fit the others, or the weights require a gradient.
        RuntimeError: no kernel can run on the operands' device.
    """
    out = ScatterMoELoRA.apply(  # type: ignore[no-untyped-call]
        inputs,
        expert_weights,
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
        use_fused_dX,
        use_fused_gather,
        validate,
        config,
    )
    return cast(Tensor, out)


@dataclass(frozen=True)
class _Call:
    """What the backward pass needs beside the saved tensors.

    Attributes:
        routing, config: as in the forward pass.
        weight: the frozen weights.
        dtype: the activation dtype.
        scaling: s.
        fan_in: finds x's row of a routed row.
        in_order: dOut is in expert order.
        use_fused_dX, use_fused_gather: see `parallel_linear_lora`.
        parameters: shape and dtype of each parameter that was given.
    """

    routing: Routing
    config: Config
    weight: Tensor | MXWeights
    dtype: torch.dtype
    scaling: float
    fan_in: int | None
    in_order: bool
    use_fused_dX: bool
    use_fused_gather: bool
    parameters: dict[str, tuple[torch.Size, torch.dtype]]

    def gradient(self, name: str) -> Tensor:
        """An uninitialised gradient in its parameter's own dtype."""
        shape, dtype = self.parameters[name]
        return torch.empty(shape, dtype=compute_dtype(dtype), device=self.routing.offsets.device)


@dataclass(frozen=True)
class Prepared:
    """One validated call with its operands as the kernels take them; both passes start from it.

    Attributes:
        problem: the caller's operands.
        call: what the backward pass needs.
        rows: x.
        adapter: A and B beside the forward's product.
        bias, gate: as kernel operands.
    """

    problem: Problem
    call: _Call
    rows: Tensor
    adapter: Adapter | None
    bias: Tensor | None
    gate: Tensor | None

    @classmethod
    def of(
        cls,
        problem: Problem,
        use_fused_dX: bool,
        use_fused_gather: bool,
        validate: bool = False,
        config: Config | None = None,
    ) -> Prepared:
        """Validate a call; see `parallel_linear_lora` for what it raises."""
        config = check_problem(problem, validate, config)
        x, weights, gates = problem.inputs, problem.expert_weights, problem.gates
        k, grouped_in = problem.k, problem.grouped_in
        rows, fan_in = operand(x), None if grouped_in else k
        weight = weights if isinstance(weights, MXWeights) else _dense(weights)
        routing = routing_of(problem.sorted_scattered_idxs, problem.expert_offsets)
        named = {name: getattr(problem, name) for name in ("lora_A", "lora_B", "expert_biases", "gates")}
        call = _Call(
            routing,
            config,
            weight,
            x.dtype,
            problem.scaling,
            fan_in,
            problem.grouped_out,
            use_fused_dX or config.hopper,
            use_fused_gather or config.hopper,
            {name: (p.shape, p.dtype) for name, p in named.items() if p is not None},
        )
        adapter = Adapter.of(problem.lora_A, problem.lora_B, problem.scaling, routing.E, x.dtype)
        bias = None if problem.expert_biases is None else operand(problem.expert_biases)
        gate = None if gates is None else operand(gates.to(x.dtype))
        return cls(problem, call, rows, adapter, bias, gate)

    def forward(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """The layer's output; Z; and Y [P, N], which is the output where there are no gates."""
        problem, call = self.problem, self.call
        rows, adapter, bias, gate = self.rows, self.adapter, self.bias, self.gate
        routing, config, weight = call.routing, call.config, call.weight
        fan_in, grouped_out = call.fan_in, call.in_order
        z = adapter.project(rows, routing, config, fan_in) if adapter else None
        lora = adapter.share(z) if adapter and z is not None else None
        y = rows.new_empty(problem.P, problem.N)
        fan_out = None if grouped_out or gate is not None else 1
        matrix = PackedMatrix(weight, call.dtype) if isinstance(weight, MXWeights) else weight
        grouped_matmul(rows, matrix, routing, config, y, fan_in, fan_out, lora, bias)
        out = y if gate is None else combine(y, routing, y.new_empty(gate.shape[0], problem.N), gate)
        return out, z, y

    def saved(self, z: Tensor | None, y: Tensor | None) -> tuple[Tensor | None, ...]:
        """The tensors that `ScatterMoELoRA.backward` reads; `y` only if the gates need their gradient."""
        down, up = (self.adapter.down, self.adapter.up) if self.adapter else (None, None)
        return self.rows, down, up, self.gate, z, y


class ScatterMoELoRA(torch.autograd.Function):
    """The layer as an autograd function: gradients for x, A, B, biases and gates, each only if asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        expert_weights: Tensor | MXWeights,
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
        validate: bool = False,
        config: Config | None = None,
    ) -> Tensor:
        """See `parallel_linear_lora`."""
        problem = Problem(
            x,
            expert_weights,
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
        prepared = Prepared.of(problem, use_fused_dX, use_fused_gather, validate, config)
        out, z, y = prepared.forward()
        ctx.save_for_backward(*prepared.saved(z, y if ctx.needs_input_grad[10] else None))
        ctx.call = prepared.call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """dOut to the gradients that are needed; nothing else is computed, and nothing saved is changed."""
        x, down, up, gate, z, y = ctx.saved_tensors
        call: _Call = ctx.call
        routing, config, fan_in = call.routing, call.config, call.fan_in
        need_x, need_A, need_B, need_bias, need_gates = (ctx.needs_input_grad[i] for i in (0, 6, 7, 9, 10))
        dx = dA = dB = dbias = dgates = v = lora = None

        if need_gates:
            dgates = call.gradient("gates").zero_()
        dy, fan = _routed_gradient(call, operand(grad_out), gate, y, dgates)
        if down is not None and (need_x or need_A):
            adapter = Adapter(down, up, call.scaling).transposed()
            v = adapter.project(dy, routing, config, fan)
            lora = adapter.share(v)
        if need_x:
            dx = _input_gradient(call, x, dy, fan, lora)
        if need_A and v is not None:
            dA = call.gradient("lora_A")
            grouped_outer(v, x, routing, config, call.scaling, dA.view(routing.E, -1, x.shape[1]), fan_in)
        if need_B:
            dB = call.gradient("lora_B")
            views = dB.view(dB.shape[0], routing.E, -1).permute(1, 2, 0)
            grouped_outer(z, dy, routing, config, call.scaling, views, fan)
        if need_bias:
            dbias = call.gradient("expert_biases")
            grouped_sum(dy, routing, dbias, fan)
        return dx, *(None,) * 5, dA, dB, None, dbias, dgates, *(None,) * 6


def _dense(weights: Tensor) -> Tensor:
    """Dense weights as the kernels read them: as they are, strides included, upcast only under the interpreter."""
    return weights.detach().to(compute_dtype(weights.dtype))


def _routed_gradient(
    call: _Call, grad_out: Tensor, gate: Tensor | None, y: Tensor | None, dgates: Tensor | None
) -> tuple[Tensor, int | None]:
    """dY, and the fan that finds a routed row in it; fills `dgates` if given.

    With gates dY is made in expert order; without, dOut is dY, read in place unless it is to be gathered first.
    """
    if gate is None and (call.in_order or call.use_fused_gather):
        return grad_out, None if call.in_order else 1
    dy = grad_out.new_empty(call.routing.P, grad_out.shape[1])
    slots = 1 if gate is None else gate.shape[1]
    return spread(grad_out, call.routing, dy, slots, gate, y, dgates), None


def _input_gradient(call: _Call, x: Tensor, dy: Tensor, fan: int | None, lora: LowRank | None) -> Tensor:
    """dX: every routed row's D, then the sum over the slots that read the same row of x."""
    matrix: Tensor | PackedMatrix
    if not isinstance(call.weight, MXWeights):
        matrix = call.weight.mT
    elif call.use_fused_dX:
        matrix = PackedMatrix(call.weight, call.dtype, transposed=True)
    else:
        matrix = operand(dequantize_experts(call.weight, active_or_sentinel(call.routing), call.dtype))
    d = x.new_empty(call.routing.P, x.shape[1])
    one_slot = call.fan_in in (None, 1)
    grouped_matmul(dy, matrix, call.routing, call.config, d, fan, call.fan_in if one_slot else None, lora)
    return d if one_slot else combine(d, call.routing, torch.empty_like(x))
