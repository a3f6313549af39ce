"""One call's forward and backward pass as launches of kernels: operands in, results out, nothing kept between calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mxref.kernels.device.configs import Config
from mxref.kernels.device.dequant import active_or_sentinel, dequantize_experts
from mxref.kernels.device.grouped_matmul import LowRank, PackedMatrix, grouped_matmul
from mxref.kernels.device.grouped_outer import grouped_outer, grouped_sum
from mxref.kernels.device.launch import compute_dtype
from mxref.kernels.device.schedule import Routing
from mxref.kernels.device.slots import combine, spread
from mxref.kernels.layer.operands import (
    adapter_of,
    check_problem,
    columns_by_expert,
    frozen_weights,
    operand,
    project,
    routing_of,
    rows_by_expert,
)
from mxref.problem import Problem
from mxref.weights import MXWeights

__all__ = ["Call", "Needs", "Plan", "Saved", "gradients"]


class Needs(NamedTuple):
    """Which operands need a gradient."""

    inputs: bool
    lora_A: bool
    lora_B: bool
    expert_biases: bool
    gates: bool


class Saved(NamedTuple):
    """The tensors that the backward pass reads; None where no gradient that is needed reads it.

    positions, offsets: the routing. rows: x. weight, scales: codes and scales, or dense weights without scales.
    A, B: lora_A and lora_B. gate: the gates. z, y: the forward's Z and, in expert order, Y.
    """

    positions: Tensor
    offsets: Tensor
    rows: Tensor | None
    weight: Tensor | None
    scales: Tensor | None
    A: Tensor | None
    B: Tensor | None
    gate: Tensor | None
    z: Tensor | None
    y: Tensor | None


@dataclass(frozen=True)
class Plan:
    """What the backward pass needs beside tensors. It holds none: those are autograd's to keep, or to let go.

    Attributes:
        config: the tiling.
        dtype: the activation dtype.
        scaling: s.
        fan_in: finds x's row of a routed row.
        in_order: dOut is in expert order.
        use_fused_dX, use_fused_gather: see `parallel_linear_lora`.
        operands: shape and dtype of each operand of `Needs` that was given.
    """

    config: Config
    dtype: torch.dtype
    scaling: float
    fan_in: int | None
    in_order: bool
    use_fused_dX: bool
    use_fused_gather: bool
    operands: dict[str, tuple[torch.Size, torch.dtype]]

    def gradient(self, name: str, like: Tensor) -> Tensor:
        """An uninitialised gradient in its operand's own dtype, where `like` lies."""
        shape, dtype = self.operands[name]
        return torch.empty(shape, dtype=compute_dtype(dtype), device=like.device)


@dataclass(frozen=True)
class Call:
    """One validated call with its operands as the kernels take them.

    Attributes:
        plan: what is known of it beside tensors.
        routing: which rows belong to which expert.
        rows: x.
        weight: the frozen weights.
        A, B: lora_A and lora_B, as kernel operands like the next two.
        bias, gate: biases and gates.
    """

    plan: Plan
    routing: Routing
    rows: Tensor
    weight: Tensor | MXWeights
    A: Tensor | None
    B: Tensor | None
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
    ) -> Call:
        """Validate a call; see `parallel_linear_lora` for what it raises."""
        config = check_problem(problem, validate, config)
        given = {name: x for name in Needs._fields if (x := getattr(problem, name)) is not None}
        plan = Plan(
            config,
            problem.dtype,
            problem.scaling,
            None if problem.grouped_in else problem.k,
            problem.grouped_out,
            use_fused_dX or config.hopper,
            use_fused_gather or config.hopper,
            {name: (x.shape, x.dtype) for name, x in given.items()},
        )
        weights, bias, gates = problem.expert_weights, problem.expert_biases, problem.gates
        A, B = adapter_of(problem)
        return cls(
            plan,
            routing_of(problem.sorted_scattered_idxs, problem.expert_offsets),
            operand(problem.inputs),
            weights if isinstance(weights, MXWeights) else _dense(weights),
            A,
            B,
            None if bias is None else operand(bias),
            None if gates is None else operand(gates.to(problem.dtype)),
        )

    def forward(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """The layer's output; Z; and Y [P, N], which is the output where there are no gates."""
        plan, routing, gate, weight = self.plan, self.routing, self.gate, self.weight
        z = lora = None
        if self.A is not None and self.B is not None:
            A, B = rows_by_expert(self.A, routing.E), columns_by_expert(self.B, routing.E)
            z = project(self.rows, A.mT, routing, plan.config, plan.fan_in)
            lora = LowRank(z, B.mT, plan.scaling)
        matrix = PackedMatrix(weight, plan.dtype) if isinstance(weight, MXWeights) else weight
        y = self.rows.new_empty(routing.P, matrix.shape[2])
        fan_out = None if plan.in_order or gate is not None else 1
        grouped_matmul(self.rows, matrix, routing, plan.config, y, plan.fan_in, fan_out, lora, self.bias)
        out = y if gate is None else combine(y, routing, y.new_empty(gate.shape[0], y.shape[1]), gate)
        return out, z, y

    def saved(self, needs: Needs, z: Tensor | None, y: Tensor) -> Saved:
        """What the backward pass reads, given the forward's Z and Y."""
        W = self.weight
        weight, scales = (W.packed, W.scales) if isinstance(W, MXWeights) else (W, None)
        return Saved(
            self.routing.positions,
            self.routing.offsets,
            rows=self.rows if needs.lora_A else None,
            weight=weight if needs.inputs else None,
            scales=scales if needs.inputs else None,
            A=self.A if needs.inputs else None,
            B=self.B if needs.inputs or needs.lora_A else None,
            gate=self.gate,
            z=z if needs.lora_B else None,
            y=y if needs.gates else None,
        )


def gradients(
    plan: Plan, needs: Needs, saved: Saved, routing: Routing, grad_out: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dX, dA, dB, dbias and dgates; None in the place of one that is not needed, and nothing else is computed."""
    config, dx, dA, dB, dbias, dgates, v = plan.config, None, None, None, None, None, None
    if needs.gates:
        dgates = plan.gradient("gates", grad_out).zero_()
    dy, fan = _routed_gradient(plan, routing, operand(grad_out), saved, dgates)
    if saved.B is not None:
        v = project(dy, columns_by_expert(saved.B, routing.E), routing, config, fan)
    if needs.inputs:
        dx = _input_gradient(plan, routing, saved, dy, fan, v)
    if needs.lora_A:
        assert v is not None
        assert saved.rows is not None
        dA = plan.gradient("lora_A", dy)
        grouped_outer(v, saved.rows, routing, config, plan.scaling, rows_by_expert(dA, routing.E), plan.fan_in)
    if needs.lora_B:
        assert saved.z is not None
        dB = plan.gradient("lora_B", dy)
        grouped_outer(saved.z, dy, routing, config, plan.scaling, columns_by_expert(dB, routing.E).mT, fan)
    if needs.expert_biases:
        dbias = plan.gradient("expert_biases", dy)
        grouped_sum(dy, routing, dbias, fan)
    return dx, dA, dB, dbias, dgates


def _dense(weights: Tensor) -> Tensor:
    """Dense weights as the kernels read them: as they are, strides included, upcast only under the interpreter."""
    return weights.detach().to(compute_dtype(weights.dtype))


def _routed_gradient(
    plan: Plan, routing: Routing, grad_out: Tensor, saved: Saved, dgates: Tensor | None
) -> tuple[Tensor, int | None]:
    """dY, and the fan that finds a routed row in it; fills `dgates` if given.

    With gates dY is made in expert order; without, dOut is dY, read in place unless it is to be gathered first.
    """
    gate = saved.gate
    if gate is None and (plan.in_order or plan.use_fused_gather):
        return grad_out, None if plan.in_order else 1
    dy = grad_out.new_empty(routing.P, grad_out.shape[1])
    slots = 1 if gate is None else gate.shape[1]
    return spread(grad_out, routing, dy, slots, gate, saved.y, dgates), None


def _input_gradient(
    plan: Plan, routing: Routing, saved: Saved, dy: Tensor, fan: int | None, v: Tensor | None
) -> Tensor:
    """dX: every routed row's D, then the sum over the slots that read the same row of x."""
    assert saved.weight is not None
    weight = frozen_weights(saved.weight, saved.scales)
    matrix: Tensor | PackedMatrix
    if not isinstance(weight, MXWeights):
        matrix = weight.mT
    elif plan.use_fused_dX:
        matrix = PackedMatrix(weight, plan.dtype, transposed=True)
    else:
        matrix = operand(dequantize_experts(weight, active_or_sentinel(routing), plan.dtype))
    lora = None
    if v is not None and saved.A is not None:
        lora = LowRank(v, rows_by_expert(saved.A, routing.E), plan.scaling)
    d = dy.new_empty(routing.P, matrix.shape[2])
    one_slot = plan.fan_in in (None, 1)
    grouped_matmul(dy, matrix, routing, plan.config, d, fan, plan.fan_in if one_slot else None, lora)
    return d if one_slot else combine(d, routing, plan.gradient("inputs", d))
