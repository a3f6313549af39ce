"""Packed experts as a module; `mxref.kernels.models.packing` puts it in place of a transformers experts module."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib import import_module, metadata, util
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from mxref.kernels.models.adapters import LoRA, check_adapter
from mxref.kernels.models.routed import Projection, routed_experts
from mxref.kernels.models.stacks import PROJECTIONS, PackedStacks, check_projection
from mxref.subnormals import warn_if_flushed
from mxref.weights import MXWeights

PEFT_MINIMUM = Version("0.21.0")
"""The oldest PEFT whose wrappers of parameters carry several adapters."""


class PackedExperts(PackedStacks):
    """All experts of one MoE layer, packed in MXFP4; a drop-in for a transformers experts module.

    Weights and biases are frozen, see `PackedStacks`; only adapters that the module owns train.

    Attributes:
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
        if not callable(activation):
            raise TypeError(f"activation is {type(activation).__name__}; expected a function [P, 2I] -> [P, I]")
        super().__init__(gate_up, down, biases)
        self.rank, self.alpha = 0, 0.0
        self._activation = activation
        _register_with_peft()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
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
        """Own these adapters of both projections, uncopied; their scaling becomes alpha / rank."""
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
        """The module's own adapters by projection."""
        if not self.rank:
            return {}
        pairs = {n: (getattr(self, f"{n}_lora_A"), getattr(self, f"{n}_lora_B")) for n in PROJECTIONS}
        return {name: LoRA(A, B, self.alpha / self.rank) for name, (A, B) in pairs.items()}

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        adapters: Mapping[str, LoRA] | None = None,
    ) -> Tensor:
        """[M, H], experts [M, k], gates [M, k] -> [M, H]; `adapters` by projection replace the module's own.

        Raises:
            TypeError, ValueError: as `parallel_linear_lora`.
        """
        warn_if_flushed(hidden_states.device)
        for name, adapter in (adapters or {}).items():
            check_projection(name)
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
        # detached: backward reads these bytes, whatever the parameters hold by then
        blocks, scales = (parameter.detach() for parameter in self._bytes(name))
        return Projection(blocks.flatten(-2), scales, getattr(self, f"{name}_bias"), lora, *self._stored_as(name))


def _register_with_peft() -> None:
    """Let PEFT, if installed, know packed experts.

    Raises:
        ImportError: an older PEFT is installed, which would silently leave the experts out.
    """
    if util.find_spec("peft") is None:
        return
    if (found := Version(metadata.version("peft"))) < PEFT_MINIMUM:
        raise ImportError(f"peft {found} is installed; packed experts need peft >= {PEFT_MINIMUM}")
    import_module("mxref.kernels.models.peft")
