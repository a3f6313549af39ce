"""All experts of a layer: gate_up, the model's own activation, and down with the gates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mxref.kernels.compiled.threads import compile_in_threads
from mxref.kernels.device.configs import shape_class
from mxref.kernels.device.launch import INTERPRETED, passed_on
from mxref.kernels.device.schedule import Routing
from mxref.kernels.layer.activation import gated
from mxref.kernels.layer.library import expert_linear
from mxref.kernels.models.adapters import LoRA
from mxref.routing import flatten_sort_count
from mxref.swiglu import SwiGLU
from mxref.weights import MXLayout


@dataclass(frozen=True)
class Projection:
    """One projection of all experts.

    Attributes:
        weight: packed codes uint8 [E, N, K/2] beside `scales`, or dense [E, K, N] without.
        scales: uint8 [E, N, K/32].
        bias: [E, N].
        lora: the adapter.
        layout, scales_to_128: of packed weights, see `MXWeights`.
    """

    weight: Tensor
    scales: Tensor | None = None
    bias: Tensor | None = None
    lora: LoRA | None = None
    layout: MXLayout = MXLayout.FWD
    scales_to_128: bool = False

    @property
    def kind(self) -> tuple[Any, ...]:
        """What decides which kernels start and differs between projections of one process."""
        A = None if self.lora is None else self.lora.A
        return self.weight.shape, self.layout, A if A is None else (A.shape, A.dtype, A.requires_grad)

    def without_memory(self) -> Projection:
        """The same on the meta device."""
        lora = self.lora and LoRA(_meta(self.lora.A), _meta(self.lora.B), self.lora.scaling)
        weight, scales, bias = _meta(self.weight), _meta(self.scales), _meta(self.bias)
        return replace(self, weight=weight, scales=scales, bias=bias, lora=lora)

    def apply(self, x: Tensor, k: int, order: tuple[Tensor, Tensor, Tensor], **arguments: Any) -> Tensor:
        """Every routed row times its expert's matrix, see `parallel_linear_lora`."""
        A, B, scaling = (None, None, 1.0) if self.lora is None else (self.lora.A, self.lora.B, self.lora.scaling)
        return expert_linear(
            x, self.weight, self.scales, k, *order, A, B, scaling, self.bias, use_fused_dX=True, layout=self.layout,
            scales_to_128=self.scales_to_128, **arguments,
        )  # fmt: skip


def routed_experts(
    x: Tensor,
    experts: Tensor,
    gates: Tensor,
    gate_up: Projection,
    down: Projection,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Σ over each token's slots of gate · down(activation(gate_up(x))): [M, H] in the dtype of x.

    On a GPU the first call of a kind compiles its step's kernels, forward and backward, in threads.

    Args:
        x: [M, H]; under autocast the products take autocast's dtype.
        experts: integer [M, k]; ids outside 0..E−1 contribute nothing.
        gates: [M, k].
        gate_up: H -> 2I.
        down: I -> H.
        activation: [P, 2I] -> [P, I], row by row.
    """
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    order = flatten_sort_count(experts, gate_up.weight.shape[0])
    if not (INTERPRETED or x.is_meta or passed_on(x)):
        _compile_first(x, dtype, experts, gates, gate_up, down, activation)
    routing = Routing(*order[1:])  # whose tables serve both projections, forward and backward
    hidden = gate_up.apply(x.to(dtype), experts.shape[1], order, grouped_out=True, routing=routing)
    out = down.apply(activation(hidden).to(dtype), 1, order, grouped_in=True, gates=gates, routing=routing)
    return out.to(x.dtype)


_COMPILED = set[tuple[Any, ...]]()
"""Kinds of calls whose kernels this process has compiled."""


def _compile_first(
    x: Tensor,
    dtype: torch.dtype,
    experts: Tensor,
    gates: Tensor,
    gate_up: Projection,
    down: Projection,
    activation: Callable[[Tensor], Tensor],
) -> None:
    """Before the first call of a kind: compile what it and its backward pass, if any, will start.

    A kind is what `Experts.numbers_of_tokens` tells apart, and the operands but for their rows. Kernels that this
    misses, and all while a CUDA graph is captured, are compiled at their launch.
    """
    (tokens, k), E = experts.shape, gate_up.weight.shape[0]
    trains = x.requires_grad or torch.is_grad_enabled()  # checkpointing turns grad mode off
    shapes = x.device, dtype, shape_class(tokens * k, E, dtype), tokens * k % 16 == 0, min(tokens, 2)
    kind = (*shapes, trains, x.requires_grad, gates.dtype, gates.requires_grad, gate_up.kind, down.kind)
    cuda: Any = torch.cuda
    if kind in _COMPILED or (cuda.is_initialized() and cuda.is_current_stream_capturing()):
        return
    known = isinstance(activation, Activation) and activation.form is not None

    def step(trained: tuple[bool, bool]) -> bool:
        rows, weights = _meta(x, dtype).requires_grad_(trained[0]), _meta(gates).requires_grad_(trained[1])
        both = gate_up.without_memory(), down.without_memory()
        between = activation if known else _first_half  # the model's own may have tensors on the GPU, or a state
        with torch.set_grad_enabled(trains):
            out: Any = routed_experts(rows, _meta(experts), weights, *both, between)
        if out.requires_grad:
            out.backward(torch.empty_like(out))
        return bool(out.requires_grad)

    def steps() -> None:
        if step((x.requires_grad, gates.requires_grad)):
            step((True, True))  # as in the layers behind a first one

    if compile_in_threads(steps, x):
        _COMPILED.add(kind)


def _meta(x: Any, dtype: torch.dtype | None = None) -> Any:
    """A leaf like `x` on the meta device; None for None."""
    if x is None:
        return None
    like = torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device="meta")
    return like.requires_grad_(x.requires_grad)


def _first_half(gate_up: Tensor) -> Tensor:
    return gate_up[:, : gate_up.shape[1] // 2]


@dataclass(frozen=True)
class Activation:
    """What an experts module of transformers does between its projections, [P, 2I] -> [P, I].

    One kernel where `form` is known. Otherwise the module's own function, looked up at every call: transformers may
    install `_apply_gate` under another function name, whose bound method cannot be unpickled.

    Attributes:
        experts: the module, emptied of its weights.
        form: see `mxref.kernels.models.activation.form_of`.
    """

    experts: Any
    form: SwiGLU | None = None

    def __call__(self, gate_up: Tensor) -> Tensor:
        """Row by row."""
        if self.form is not None:
            return gated(gate_up, self.form)
        out: Tensor = self.experts._apply_gate(gate_up)
        return out
