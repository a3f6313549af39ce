"""Packed experts as a module: gate_up, the model's own activation, and down with the gates, on packed weights.

`PackedExperts` takes the place of a transformers experts module; `mxref.kernels.models.packing` puts it there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mxref.kernels.layer.library import expert_linear
from mxref.kernels.layer.operands import MAX_RANK
from mxref.routing import flatten_sort_count
from mxref.weights import MXWeights

__all__ = ["PROJECTIONS", "LoRA", "PackedExperts", "Projection", "check_adapter", "routed_experts"]

PROJECTIONS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class LoRA:
    """One projection's adapter: A [E·r, K] and B [N, E·r], both expert-major, and the factor of their product."""

    A: Tensor
    B: Tensor
    scaling: float

    @classmethod
    def joined(cls, adapters: Sequence[LoRA], num_experts: int) -> LoRA:
        """One adapter whose product is the sum of the given ones', their ranks side by side; differentiable.

        The layer has one scaling, which it applies to the sum in the accumulator. Scalings that differ by powers of
        two are evened out in B, where such a factor is exact; others would need a rounding that nobody declared.

        Args:
            adapters: at least one, of any ranks.
            num_experts: E.

        Raises:
            ValueError: the scalings' ratios are not powers of two.
        """
        scaling = min((adapter.scaling for adapter in adapters), key=abs)
        if any(
            adapter.scaling != scaling and not _power_of_two_ratio(adapter.scaling, scaling) for adapter in adapters
        ):
            raise ValueError(
                f"the active adapters have scalings {[adapter.scaling for adapter in adapters]}, whose ratios are not "
                "powers of two; activate one at a time with set_adapter, or choose r and lora_alpha so that they agree"
            )
        A = [adapter.A.unflatten(0, (num_experts, -1)) for adapter in adapters]
        B = [
            (adapter.B if adapter.scaling == scaling else adapter.B * (adapter.scaling / scaling)).unflatten(
                1, (num_experts, -1)
            )
            for adapter in adapters
        ]
        return cls(torch.cat(A, 1).flatten(0, 1), torch.cat(B, 2).flatten(1), scaling)


def _power_of_two_ratio(a: float, b: float) -> bool:
    return a != 0 and b != 0 and abs(math.frexp(a / b)[0]) == 0.5


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
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    order = flatten_sort_count(experts, gate_up.weight.shape[0])
    hidden = gate_up.apply(x.to(dtype), experts.shape[1], order, grouped_out=True)
    out = down.apply(activation(hidden).to(dtype), 1, order, grouped_in=True, gates=gates)
    return out.to(x.dtype)


def check_adapter(rank: Any, alpha: Any = None, dtype: torch.dtype = torch.float32) -> None:
    """Whether the kernels can have an adapter like this.

    Raises:
        TypeError: `rank` is no integer, `alpha` no number, or `dtype` no floating-point type of 16 bits or more.
        ValueError: `rank` is not in 1..128, or `alpha` is not finite.
    """
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank is {rank!r}; expected an integer")
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"rank is {rank}; the kernels take ranks 1 to {MAX_RANK}")
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, (int, float))):
        raise TypeError(f"alpha is {alpha!r}; expected a number, or None for alpha = rank")
    if alpha is not None and not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}; expected a finite number")
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"the adapters' dtype is {dtype}; expected bf16, fp16 or fp32")


class PackedExperts(nn.Module):
    """All experts of one MoE layer, packed in MXFP4; a drop-in for a transformers experts module.

    The codes and scales are buffers under their gpt-oss checkpoint names (`gate_up_proj_blocks`, …), so no optimiser,
    no cast and no gradient reaches them, and `state_dict` holds what a gpt-oss checkpoint holds. Only the adapters,
    if any, and the biases are parameters. (Under DistributedDataParallel give `broadcast_buffers=False`: the packed
    weights never change, and would be sent anew in every step.)

    Attributes:
        num_experts: E.
        rank: of the adapters that this module owns, 0 for none.
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
        self.rank = 0
        self._activation = activation
        self._scaling = 1.0
        for name, weights in zip(PROJECTIONS, (gate_up, down), strict=True):
            blocks, scales = weights.to_gpt_oss()
            self.register_buffer(f"{name}_blocks", blocks)
            self.register_buffer(f"{name}_scales", scales)
            bias = (biases or {}).get(name)
            if bias is not None and tuple(bias.shape) != (weights.E, weights.N):
                raise ValueError(f"biases[{name!r}] has shape {tuple(bias.shape)}; expected {(weights.E, weights.N)}")
            self.register_parameter(f"{name}_bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

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
        self.rank, self._scaling = rank, (rank if alpha is None else alpha) / rank
        for name in PROJECTIONS:
            E, K, N = self.shape(name)
            device = self.get_buffer(f"{name}_scales").device
            A = torch.empty(E * rank, K, dtype=dtype, device=device)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            self.register_parameter(f"{name}_lora_A", nn.Parameter(A))
            B = torch.zeros(N, E * rank, dtype=dtype, device=device)
            self.register_parameter(f"{name}_lora_B", nn.Parameter(B))

    def remove_lora(self) -> None:
        """Drop the module's own adapters, if any."""
        for name in PROJECTIONS if self.rank else ():
            delattr(self, f"{name}_lora_A")
            delattr(self, f"{name}_lora_B")
        self.rank, self._scaling = 0, 1.0

    def own_adapters(self) -> dict[str, LoRA]:
        """The module's own adapters by projection; empty without."""
        if not self.rank:
            return {}
        pairs = {n: (getattr(self, f"{n}_lora_A"), getattr(self, f"{n}_lora_B")) for n in PROJECTIONS}
        return {name: LoRA(A, B, self._scaling) for name, (A, B) in pairs.items()}

    def shape(self, name: str) -> tuple[int, int, int]:
        """(E, K, N) of a projection.

        Raises:
            ValueError: `name` is no projection.
        """
        _check_projection(name)
        E, N, blocks, half = self.get_buffer(f"{name}_blocks").shape
        return E, 2 * blocks * half, N

    def packed_weights(self, name: str) -> MXWeights:
        """A projection's packed weights, sharing its buffers.

        Raises:
            ValueError: `name` is no projection.
        """
        _check_projection(name)
        return MXWeights.from_gpt_oss(self.get_buffer(f"{name}_blocks"), self.get_buffer(f"{name}_scales"))

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
        blocks, scales = getattr(self, f"{name}_blocks"), getattr(self, f"{name}_scales")
        return Projection(blocks.flatten(-2), scales, getattr(self, f"{name}_bias"), lora)


def _check_projection(name: str) -> None:
    if name not in PROJECTIONS:
        raise ValueError(f"name is {name!r}; expected one of {', '.join(PROJECTIONS)}")
