"""What all experts of a layer do with a token's row: gate_up, the model's own activation, and down with the gates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    routing = Routing(*order[1:])  # whose tables serve both projections, forward and backward
    hidden = gate_up.apply(x.to(dtype), experts.shape[1], order, grouped_out=True, routing=routing)
    out = down.apply(activation(hidden).to(dtype), 1, order, grouped_in=True, gates=gates, routing=routing)
    return out.to(x.dtype)


@dataclass(frozen=True)
class Activation:
    """What an experts module of transformers does between its projections, [P, 2I] -> [P, I].

    One kernel where `form` says what it is. Otherwise the module's own function, looked up by name at every call:
    transformers may install `_apply_gate` under another function name, whose bound method no pickle gives back.

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
