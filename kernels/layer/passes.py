"""One call's forward and backward pass as launches of kernels: operands in, results out, nothing kept between calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mxref.kernels.device.configs import Config
from mxref.kernels.device.dequant import active_or_sentinel, dequantize_experts
from mxref.kernels.device.grouped_matmul import LowRank, grouped_matmul
from mxref.kernels.device.grouped_outer import Outer, grouped_outer, grouped_sum
from mxref.kernels.device.launch import architecture, compute_dtype
from mxref.kernels.device.schedule import Routing
from mxref.kernels.device.slots import combine, spread
from mxref.kernels.device.stack import PackedMatrix, Stack
from mxref.kernels.layer.operands import (
    check_problem,
    columns_by_expert,
    kind_of,
    operand,
    project,
    routing_of,
    rows_by_expert,
)
from mxref.problem import Problem
from mxref.weights import MXLayout, MXWeights, stored_as

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

    positions, offsets: the routing. rows: x. weight, scales, stored: of an `MXWeights`, or dense weights alone.
    A, B: lora_A and lora_B. gate: the gates. z, y: the forward's Z and, in expert order, Y.
    """

    positions: Tensor
    offsets: Tensor
    rows: Tensor | None
    weight: Tensor | None
    scales: Tensor | None
    stored: Tensor | None
    A: Tensor | None
    B: Tensor | None
    gate: Tensor | None
    z: Tensor | None
    y: Tensor | None


@dataclass(frozen=True)
class Plan:
    """What a call is beside its tensors. It holds none: those are autograd's to keep, or to let go.

    Attributes:
        config: the tiling.
        dtype: the activation dtype.
        scaling: s.
        fan_in: finds x's row of a routed row.
        in_order: dOut is in expert order.
        use_fused_dX, use_fused_gather: see `parallel_linear_lora`.
        layout: of packed weights; FWD of dense ones, where nothing reads it.
        operands: shape and dtype of each operand of `Needs` that was given.
    """

    config: Config
    dtype: torch.dtype
    scaling: float
    fan_in: int | None
    in_order: bool
    use_fused_dX: bool
    use_fused_gather: bool
    layout: MXLayout
    operands: dict[str, tuple[torch.Size, torch.dtype]]

    def gradient(self, name: str, like: Tensor) -> Tensor:
        """An uninitialised gradient in its operand's own dtype, where `like` lies."""
        shape, dtype = self.operands[name]
        return like.new_empty(shape, dtype=compute_dtype(dtype))

    @classmethod
    def of(
        cls,
        operands: tuple[Any, ...],
        use_fused_dX: bool,
        use_fused_gather: bool,
        validate: bool = False,
        config: Config | None = None,
    ) -> Plan:
        """Check a call and plan it; see `parallel_linear_lora` for what it raises.

        Beside index values the checks read no more of an operand than its kind, and neither does the plan: what was
        found for operands of these kinds before holds again.

        Args:
            operands: the fields of a `Problem`, in its order.
            use_fused_dX, use_fused_gather: see `parallel_linear_lora`.
            validate: also check the index tensors' values on a GPU, which synchronises; on CPU they always are.
            config: a pinned tiling.
        """
        where = architecture(operands[0].device) if isinstance(operands[0], Tensor) else None
        kinds = (where, *map(kind_of, (*operands, use_fused_dX, use_fused_gather, config)))
        plan = _PLANS.get(kinds)
        if plan is None or validate or where == "interpreter":
            problem = Problem(*operands)
            tiling = check_problem(problem, validate, config)
        if plan is None:
            weights = problem.expert_weights
            layout = weights.layout if isinstance(weights, MXWeights) else MXLayout.FWD
            given = {name: x for name in Needs._fields if (x := getattr(problem, name)) is not None}
            plan = cls(
                tiling,
                problem.dtype,
                problem.scaling,
                None if problem.grouped_in else problem.k,
                problem.grouped_out,
                use_fused_dX or tiling.fused or layout == MXLayout.FRAGMENTS,  # which products alone decode
                use_fused_gather or tiling.fused,
                layout,
                {name: (x.shape, x.dtype) for name, x in given.items()},
            )
            if len(_PLANS) >= 4096:
                _PLANS.clear()
            _PLANS[kinds] = plan
        return plan


_PLANS: dict[tuple[Any, ...], Plan] = {}
"""Plans by the kinds of a call's operands; none holds a tensor."""


class Call(NamedTuple):
    """One checked call with its operands as the kernels take them.

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
    weight: Stack | PackedMatrix
    A: Tensor | None
    B: Tensor | None
    bias: Tensor | None
    gate: Tensor | None

    @classmethod
    def of(
        cls,
        operands: tuple[Any, ...],
        use_fused_dX: bool,
        use_fused_gather: bool,
        validate: bool = False,
        config: Config | None = None,
        routing: Routing | None = None,
    ) -> Call:
        """Check a call, see `parallel_linear_lora`; `operands` are the fields of a `Problem`, in its order."""
        plan = Plan.of(operands, use_fused_dX, use_fused_gather, validate, config)
        x, weights, _, _, positions, offsets, A, B, _, bias, gates, _, _ = operands
        packed = isinstance(weights, MXWeights)
        return cls(
            plan,
            routing_of(positions, offsets, routing),
            operand(x),
            PackedMatrix.of(weights, plan.dtype) if packed else Stack.of(_dense(weights)),
            None if A is None else operand(A, plan.dtype),
            None if B is None else operand(B, plan.dtype),
            None if bias is None else operand(bias),
            None if gates is None else operand(gates, plan.dtype),
        )

    def forward(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """The layer's output; Z; and Y [P, N], which is the output where there are no gates."""
        plan, routing, gate, weight = self.plan, self.routing, self.gate, self.weight
        z = lora = None
        if self.A is not None and self.B is not None:
            A, B = rows_by_expert(self.A, routing.E), columns_by_expert(self.B, routing.E)
            z = project(self.rows, A.transposed, routing, plan.config, plan.fan_in)
            lora = LowRank(z, B.transposed, plan.scaling)
        y = self.rows.new_empty(routing.P, weight.shape[2])
        fan_out = None if plan.in_order or gate is not None else 1
        grouped_matmul(self.rows, weight, routing, plan.config, y, plan.fan_in, fan_out, lora, self.bias)
        out = y if gate is None else combine(y, routing, y.new_empty(gate.shape[0], y.shape[1]), gate)
        return out, z, y

    def saved(self, needs: Needs, z: Tensor | None, y: Tensor) -> Saved:
        """What the backward pass reads, given the forward's Z and Y."""
        W = self.weight
        weight, scales, stored = W.tensor if isinstance(W, Stack) else W.packed, None, None
        if isinstance(W, PackedMatrix):
            scales, stored = W.scales, stored_as(W.layout, W.scales_to_128)
        return Saved(
            self.routing.positions,
            self.routing.offsets,
            rows=self.rows if needs.lora_A else None,
            weight=weight if needs.inputs else None,
            scales=scales if needs.inputs else None,
            stored=stored if needs.inputs else None,
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
        dgates = plan.gradient("gates", grad_out)
    dy, fan = _routed_gradient(plan, routing, operand(grad_out), saved, dgates)
    if saved.B is not None:
        v = project(dy, columns_by_expert(saved.B, routing.E), routing, config, fan)
    if needs.inputs:
        dx = _input_gradient(plan, routing, saved, dy, fan, v)
    sums = []
    if needs.lora_A:
        assert v is not None
        assert saved.rows is not None
        dA = plan.gradient("lora_A", dy)
        sums.append(Outer(rows_by_expert(dA, routing.E), v, saved.rows, plan.fan_in))
    if needs.lora_B:
        assert saved.z is not None
        dB = plan.gradient("lora_B", dy)
        sums.append(Outer(columns_by_expert(dB, routing.E).transposed, saved.z, dy, fan))
    if sums:
        grouped_outer(routing, config, plan.scaling, *sums)
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
    matrix: Stack | PackedMatrix
    if saved.scales is None:
        matrix = Stack.of(saved.weight).transposed
    else:
        matrix = _packed_as_planned(plan, saved)
        if not plan.use_fused_dX:
            _, N, K = matrix.shape
            stack = MXWeights(matrix.packed, matrix.scales, K, N)
            matrix = Stack.of(operand(dequantize_experts(stack, active_or_sentinel(routing), plan.dtype)))
    lora = None
    if v is not None and saved.A is not None:
        lora = LowRank(v, rows_by_expert(saved.A, routing.E), plan.scaling)
    d = dy.new_empty(routing.P, matrix.shape[2])
    one_slot = plan.fan_in in (None, 1)
    grouped_matmul(dy, matrix, routing, plan.config, d, fan, plan.fan_in if one_slot else None, lora)
    return d if one_slot else combine(d, routing, plan.gradient("inputs", d))


def _packed_as_planned(plan: Plan, saved: Saved) -> PackedMatrix:
    """The packed matrices of dX in the plan's layout, which they need not have if the forward was computed again."""
    packed, scales, stored = saved.weight, saved.scales, saved.stored
    assert packed is not None
    assert scales is not None
    assert stored is not None
    layout, to_128 = stored.tolist()
    if layout != plan.layout:
        K, N = 2 * packed.shape[2], packed.shape[1]
        found = MXWeights(packed, scales, K, N, MXLayout(layout), scales_to_128=bool(to_128)).repack(plan.layout)
        packed, scales, to_128 = found.packed, found.scales, found.scales_to_128
    return PackedMatrix(packed, scales, plan.dtype, plan.layout, bool(to_128), transposed=True)
