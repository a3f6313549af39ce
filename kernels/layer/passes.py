"""One call's forward and backward pass as launches of kernels: operands in, results out, nothing kept between calls."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from mxref.kernels.device.configs import Config
from mxref.kernels.device.dequant import active_or_sentinel, dequantize_experts
from mxref.kernels.device.grouped_outer import grouped_sum
from mxref.kernels.device.launch import compute_dtype, stream_of
from mxref.kernels.device.schedule import Routing
from mxref.kernels.device.slots import combine, spread
from mxref.kernels.device.stack import PackedMatrix, Stack
from mxref.kernels.layer.operands import dense_weights, operand, routing_of
from mxref.kernels.layer.plan import Needs, Plan
from mxref.weights import MXLayout, MXWeights, stored_as

__all__ = ["Call", "Saved", "gradients"]


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


class Call(NamedTuple):
    """One checked call with its operands as the kernels take them.

    Attributes:
        plan: what is known of it beside tensors.
        routing: which rows belong to which expert.
        rows: x.
        weight: dense weights, or the codes of packed ones.
        scales: of packed weights.
        A, B: lora_A and lora_B, as kernel operands like the next two.
        bias, gate: biases and gates.
    """

    plan: Plan
    routing: Routing
    rows: Tensor
    weight: Tensor
    scales: Tensor | None
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
            weights.packed if packed else dense_weights(weights),
            weights.scales if packed else None,
            None if A is None else operand(A, plan.dtype),
            None if B is None else operand(B, plan.dtype),
            None if bias is None else operand(bias),
            None if gates is None else operand(gates, plan.dtype),
        )

    def forward(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """The layer's output; Z; and Y [P, N], which is the output where there are no gates."""
        plan, routing, rows, gate = self.plan, self.routing, self.rows, self.gate
        stream = stream_of(rows)
        z = None if self.A is None else plan.z(stream, rows, self.A, None, routing)
        y = plan.y(stream, rows, self.weight, self.scales, routing, z, self.B, self.bias)
        out = y if gate is None else combine(stream, y, routing, y.new_empty(gate.shape[0], y.shape[1]), gate)
        return out, z, y

    def saved(self, needs: Needs, z: Tensor | None, y: Tensor) -> Saved:
        """What the backward pass reads, given the forward's Z and Y."""
        inputs, matrix, stored = needs.inputs, self.plan.matrix, None
        if inputs and isinstance(matrix, PackedMatrix):
            stored = stored_as(matrix.layout, matrix.scales_to_128)
        return Saved(
            self.routing.positions,
            self.routing.offsets,
            self.rows if needs.lora_A else None,
            self.weight if inputs else None,
            self.scales if inputs else None,
            stored,
            self.A if inputs else None,
            self.B if inputs or needs.lora_A else None,
            self.gate,
            z if needs.lora_B else None,
            y if needs.gates else None,
        )


def gradients(
    plan: Plan, needs: Needs, saved: Saved, routing: Routing, grad_out: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dX, dA, dB, dbias and dgates; None in the place of one that is not needed, and nothing else is computed."""
    dx = dA = dB = dbias = v = None
    stream = stream_of(grad_out)
    dgates = plan.gradient("gates", grad_out) if needs.gates else None
    dy = _routed_gradient(stream, plan, routing, operand(grad_out, compute_dtype(plan.dtype)), saved, dgates)
    if saved.B is not None:
        v = plan.v(stream, dy, saved.B, None, routing)
    if needs.inputs:
        dx = _input_gradient(stream, plan, routing, saved, dy, v)
    sums: list[Tensor | None] = []
    if needs.lora_A:
        dA = plan.gradient("lora_A", dy)
        sums += dA, v, saved.rows
    if needs.lora_B:
        dB = plan.gradient("lora_B", dy)
        sums += dB, saved.z, dy
    if sums:
        missing = (None,) * (6 - len(sums))
        plan.sums[needs.lora_A, needs.lora_B](stream, routing.positions, routing.offsets, *sums, *missing)
    if needs.expert_biases:
        dbias = plan.gradient("expert_biases", dy)
        grouped_sum(stream, dy, routing, dbias, plan.fan_of_dY)
    return dx, dA, dB, dbias, dgates


def _routed_gradient(
    stream: int | None, plan: Plan, routing: Routing, grad_out: Tensor, saved: Saved, dgates: Tensor | None
) -> Tensor:
    """dY; fills `dgates` if given."""
    if not plan.spread:
        return grad_out
    gate, dy = saved.gate, grad_out.new_empty(plan.P, grad_out.shape[1])
    return spread(stream, grad_out, routing, dy, 1 if gate is None else gate.shape[1], gate, saved.y, dgates)


def _input_gradient(
    stream: int | None, plan: Plan, routing: Routing, saved: Saved, dy: Tensor, v: Tensor | None
) -> Tensor:
    """dX: every routed row's D, then the sum over the slots that read the same row of x."""
    weight, scales, matrix = _weights_as_planned(plan, saved)
    if scales is not None and not plan.use_fused_dX:
        _, N, K = matrix.shape
        stack = MXWeights(weight, scales, K, N)
        weight, scales = operand(dequantize_experts(stack, active_or_sentinel(routing), plan.dtype)), None
    product = plan.d if matrix is plan.matrix_of_dX else plan.d_by(matrix)
    d = product(stream, dy, weight, scales, routing, v, saved.A)
    return d if plan.one_slot else combine(stream, d, routing, plan.gradient("inputs", d))


def _weights_as_planned(plan: Plan, saved: Saved) -> tuple[Tensor, Tensor | None, Stack | PackedMatrix]:
    """The weights for dX, and how they lie: as planned, unless a forward that was computed again found others."""
    weight, scales, matrix = saved.weight, saved.scales, plan.matrix_of_dX
    assert weight is not None
    if isinstance(plan.matrix, Stack):
        if weight.stride() != plan.matrix.strides:
            matrix = Stack.of(weight).transposed
        return weight, None, matrix
    assert scales is not None
    assert saved.stored is not None
    layout, to_128 = saved.stored.tolist()
    if layout != plan.matrix.layout:
        _, K, N = plan.matrix.shape
        found = MXWeights(weight, scales, K, N, MXLayout(layout), scales_to_128=bool(to_128)).repack(plan.matrix.layout)
        weight, scales, to_128 = found.packed, found.scales, found.scales_to_128
    if isinstance(matrix, PackedMatrix) and matrix.scales_to_128 != to_128:
        matrix = matrix._replace(scales_to_128=bool(to_128))
    return weight, scales, matrix
