"""Packed experts as a module: gate_up, the model's own activation, and down with the gates, on packed weights.

`PackedExperts` takes the place of a transformers experts module; `mxref.kernels.models.packing` puts it there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata, util
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from mxref.kernels.device.schedule import Routing
from mxref.kernels.layer.activation import gated
from mxref.kernels.layer.library import expert_linear
from mxref.kernels.models.adapters import LoRA, check_adapter
from mxref.routing import flatten_sort_count
from mxref.swiglu import SwiGLU
from mxref.weights import MXWeights

PROJECTIONS = ("gate_up_proj", "down_proj")
"""Names of both projections, in the order in which transformers' experts modules hold them."""

PEFT_MINIMUM = Version("0.21.0")
"""The oldest PEFT whose wrappers of parameters carry several adapters."""


@dataclass(frozen=True)
class Projection:
    """One projection of all experts.

    Attributes:
        weight: packed codes uint8 [E, N, K/2] beside `scales`, or dense [E, K, N] without.
        scales: uint8 [E, N, K/32].
        bias: [E, N].
        lora: the adapter.
    """

    weight: Tensor
    scales: Tensor | None = None
    bias: Tensor | None = None
    lora: LoRA | None = None

    def apply(self, x: Tensor, k: int, order: tuple[Tensor, Tensor, Tensor], **arguments: Any) -> Tensor:
        """Every routed row times its expert's matrix, see `parallel_linear_lora`."""
        A, B, scaling = (None, None, 1.0) if self.lora is None else (self.lora.A, self.lora.B, self.lora.scaling)
        return expert_linear(
            x, self.weight, self.scales, k, *order, A, B, scaling, self.bias, use_fused_dX=True, **arguments
        )


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


class PackedExperts(nn.Module):
    """All experts of one MoE layer, packed in MXFP4; a drop-in for a transformers experts module.

    The codes and scales are frozen uint8 parameters under their gpt-oss checkpoint names (`gate_up_proj_blocks`
    [E, N, K/32, 16], `gate_up_proj_scales` [E, N, K/32], …): no optimiser and no gradient reaches them, they are
    sharded, moved and broadcast as weights are, and `state_dict` holds what a gpt-oss checkpoint holds. `to(dtype)`,
    `half()` and the like leave them alone; what would convert bytes to numbers (`type(dtype)`, loading other dtypes) is
    refused. Biases are frozen too. The adapters, if the module owns any, are the only parameters that train.

    Attributes:
        num_experts: E.
        rank: of the adapters that this module owns, 0 for none.
        alpha: their product's factor is alpha / rank.
    """

    is_transposed = True
    """Projections act as [E, K, N] matrices, in and out, which is how PEFT reads their shape."""

    def __init__(
        self,
        gate_up: MXWeights,
        down: MXWeights,
        activation: Callable[[Tensor], Tensor],
        biases: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        for name, weights in (("gate_up", gate_up), ("down", down)):
            if not isinstance(weights, MXWeights):
                raise TypeError(f"{name} is {type(weights).__name__}; expected MXWeights")
        if gate_up.E != down.E:
            raise ValueError(f"gate_up holds {gate_up.E} experts and down {down.E}; expected the same number")
        if gate_up.K != down.N:
            raise ValueError(
                f"gate_up reads {gate_up.K} columns and down gives {down.N}; expected the hidden size in both"
            )
        if not callable(activation):
            raise TypeError(f"activation is {type(activation).__name__}; expected a function [P, 2I] -> [P, I]")
        if unknown := set(biases or {}) - set(PROJECTIONS):
            raise ValueError(f"biases holds {sorted(unknown)}; expected some of {', '.join(PROJECTIONS)}")
        self.num_experts = gate_up.E
        self.rank, self.alpha = 0, 0.0
        self._activation = activation
        for name, weights in zip(PROJECTIONS, (gate_up, down), strict=True):
            blocks, scales = weights.to_gpt_oss()
            self.register_parameter(f"{name}_blocks", nn.Parameter(blocks, requires_grad=False))
            self.register_parameter(f"{name}_scales", nn.Parameter(scales, requires_grad=False))
            bias = (biases or {}).get(name)
            if bias is not None and tuple(bias.shape) != (weights.E, weights.N):
                raise ValueError(f"biases[{name!r}] has shape {tuple(bias.shape)}; expected {(weights.E, weights.N)}")
            self.register_parameter(f"{name}_bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        _register_with_peft()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As nn.Module does, for copies and pickles."""
        restore: Any = super().__setstate__
        restore(state)
        _register_with_peft()

    def add_lora(self, rank: int, alpha: float | None = None, dtype: torch.dtype = torch.float32) -> None:
        """Give both projections adapters with zero product: A uniform as PEFT draws it, B zero.

        Args:
            rank: r.
            alpha: the scaling is alpha / rank; alpha = rank by default.
            dtype: of the parameters and of their gradients.

        Raises:
            TypeError, ValueError: as `check_adapter`; also if there are adapters already.
        """
        check_adapter(rank, alpha, dtype)
        if self.rank:
            raise ValueError(f"there are adapters of rank {self.rank} already; call remove_lora() first")
        adapters = {}
        for name in PROJECTIONS:
            E, K, N = self.shape(name)
            device = getattr(self, f"{name}_scales").device
            A = torch.empty(E * rank, K, dtype=dtype, device=device)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            adapters[name] = LoRA(A, torch.zeros(N, E * rank, dtype=dtype, device=device), 0.0)
        self.adopt_lora(rank, float(rank if alpha is None else alpha), adapters)

    def adopt_lora(self, rank: int, alpha: float, adapters: Mapping[str, LoRA]) -> None:
        """Own these adapters of both projections, without a copy; their scaling becomes alpha / rank."""
        self.rank, self.alpha = rank, alpha
        for name in PROJECTIONS:
            for part, value in (("A", adapters[name].A), ("B", adapters[name].B)):
                parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach())
                self.register_parameter(f"{name}_lora_{part}", parameter)

    def remove_lora(self) -> None:
        """Drop the module's own adapters, if any."""
        for name in PROJECTIONS if self.rank else ():
            delattr(self, f"{name}_lora_A")
            delattr(self, f"{name}_lora_B")
        self.rank, self.alpha = 0, 0.0

    def own_adapters(self) -> dict[str, LoRA]:
        """The module's own adapters by projection; empty without."""
        if not self.rank:
            return {}
        pairs = {n: (getattr(self, f"{n}_lora_A"), getattr(self, f"{n}_lora_B")) for n in PROJECTIONS}
        return {name: LoRA(A, B, self.alpha / self.rank) for name, (A, B) in pairs.items()}

    def shape(self, name: str) -> tuple[int, int, int]:
        """(E, K, N) of a projection.

        Raises:
            ValueError: `name` is no projection.
        """
        _check_projection(name)
        E, N, blocks, half = getattr(self, f"{name}_blocks").shape
        return E, 2 * blocks * half, N

    def packed_weights(self, name: str) -> MXWeights:
        """A projection's packed weights, sharing its memory.

        Raises:
            ValueError: `name` is no projection.
        """
        _check_projection(name)
        blocks, scales = (getattr(self, f"{name}_{part}").detach() for part in ("blocks", "scales"))
        return MXWeights.from_gpt_oss(blocks, scales)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        adapters: Mapping[str, LoRA] | None = None,
    ) -> Tensor:
        """[M, H], experts [M, k], gates [M, k] -> [M, H]; `adapters` by projection replace the module's own.

        Raises:
            TypeError, ValueError: an argument does not fit the weights, see `parallel_linear_lora`.
        """
        for name, adapter in (adapters or {}).items():
            _check_projection(name)
            if not isinstance(adapter, LoRA):
                raise TypeError(f"adapters[{name!r}] is {type(adapter).__name__}; expected LoRA")
        lora = self.own_adapters() if adapters is None else adapters
        gate_up, down = (self._projection(name, lora.get(name)) for name in PROJECTIONS)
        return routed_experts(hidden_states, top_k_index, top_k_weights, gate_up, down, self._activation)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        shapes = ", ".join(f"{name} {self.shape(name)}" for name in PROJECTIONS)
        return f"MXFP4 [E, K, N]: {shapes}, rank={self.rank}"

    def _projection(self, name: str, lora: LoRA | None) -> Projection:
        # detached: what backward reads are these bytes, whatever the parameters hold by then
        blocks, scales = (getattr(self, f"{name}_{part}").detach() for part in ("blocks", "scales"))
        return Projection(blocks.flatten(-2), scales, getattr(self, f"{name}_bias"), lora)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedExperts:
        """What `to`, `half`, `type`, `cuda` and the like go through; refused before anything has changed."""
        device = getattr(self, _PACKED[0]).device
        converted = fn(torch.zeros(0, dtype=torch.uint8, device=device)).dtype
        if converted != torch.uint8:
            raise TypeError(
                f"packed experts cannot become {converted}: their uint8 parameters are codes and scales, not numbers; "
                "to(dtype) casts the other parameters and leaves these alone"
            )
        apply: Any = super()._apply
        apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """As nn.Module does; `load_state_dict` would otherwise convert other dtypes to bytes, value by value."""
        for name in _PACKED:
            stored = state_dict.get(prefix + name)
            if stored is not None and stored.dtype != torch.uint8:
                raise TypeError(f"{prefix}{name} is {stored.dtype}; expected torch.uint8 bytes, as a view if need be")
        super()._load_from_state_dict(state_dict, prefix, *rest)


_PACKED = tuple(f"{name}_{part}" for name in PROJECTIONS for part in ("blocks", "scales"))


def _register_with_peft() -> None:
    """Let PEFT, where it is installed, know packed experts before anything can add an adapter to them.

    Raises:
        ImportError: an older PEFT is installed, which would leave the experts out without a word.
    """
    if util.find_spec("peft") is None:
        return
    if (found := Version(metadata.version("peft"))) < PEFT_MINIMUM:
        raise ImportError(f"peft {found} is installed; packed experts need peft >= {PEFT_MINIMUM}")
    import_module("mxref.kernels.models.peft")


def _check_projection(name: str) -> None:
    if name not in PROJECTIONS:
        raise ValueError(f"name is {name!r}; expected one of {', '.join(PROJECTIONS)}")
