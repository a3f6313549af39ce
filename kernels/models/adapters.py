"""A LoRA adapter of one expert projection: matrices, layouts here and in PEFT, limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mxref.kernels.layer.operands import MAX_RANK


@dataclass(frozen=True)
class LoRA:
    """One projection's adapter: A [E·r, K] and B [N, E·r], expert-major, and their product's factor."""

    A: Tensor
    B: Tensor
    scaling: float

    @classmethod
    def joined(cls, adapters: Sequence[LoRA], num_experts: int) -> LoRA:
        """One adapter whose product is the sum of the given ones', ranks side by side; differentiable.

        Its scaling is that of the largest magnitude; the other adapters' ratios to it go into their B in fp32: exact
        for powers of two, else one fp32 rounding of B, before B is rounded to the activation dtype.

        Args:
            adapters: at least one.
            num_experts: E.

        Raises:
            ValueError: the ranks add up to more than the kernels take.
        """
        A = [adapter.A.reshape(num_experts, -1, adapter.A.shape[1]) for adapter in adapters]
        ranks = [part.shape[1] for part in A]
        if sum(ranks) > MAX_RANK:
            raise ValueError(f"the active adapters have ranks {ranks}; together the kernels take up to {MAX_RANK}")
        scaling = max((adapter.scaling for adapter in adapters), key=abs)
        B = [
            adapter.B if adapter.scaling == scaling else _times(adapter.B, adapter.scaling / scaling)
            for adapter in adapters
        ]
        return cls(
            torch.cat(A, 1).flatten(0, 1),
            torch.cat([part.reshape(part.shape[0], num_experts, -1) for part in B], 2).flatten(1),
            scaling,
        )


def check_adapter(rank: Any, alpha: Any = None, dtype: Any = torch.float32) -> None:
    """Whether the kernels take such an adapter.

    Raises:
        TypeError: `rank` is no integer, `alpha` no number, or `dtype` no floating-point dtype of 16 bits or more.
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
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"the adapters' dtype is {dtype!r}; expected torch.bfloat16, torch.float16 or torch.float32")


def expert_major(B: Tensor, num_experts: int) -> Tensor:
    """PEFT's rank-major B [N, r·E] with its columns by expert, [N, E·r]; differentiable.

    Raises:
        ValueError: `B` is no matrix whose columns are a multiple of `num_experts`.
    """
    if B.ndim != 2 or B.shape[1] % num_experts:
        raise ValueError(f"B has shape {tuple(B.shape)}; expected [N, r·E] with E = {num_experts}")
    return B.reshape(B.shape[0], -1, num_experts).mT.reshape(B.shape)


def rank_major(B: Tensor, num_experts: int) -> Tensor:
    """The inverse of `expert_major`: B [N, E·r] in PEFT's order of columns, [N, r·E]."""
    return expert_major(B, B.shape[1] // num_experts)


def unwrap_adapters(experts: nn.Module) -> tuple[Any, dict[str, LoRA]]:
    """The experts module in PEFT's nested ParamWrappers, and the active adapters, joined, by parameter name.

    Raises:
        ValueError: an adapter is merged, or the active adapters cannot be joined.
    """
    found: dict[str, LoRA] = {}
    module: Any = experts
    while hasattr(module, "base_layer") and hasattr(module, "parameter_name"):
        if module.merged:
            raise ValueError(f"an adapter is merged into {module.parameter_name}; call unmerge_adapter first")
        active = [] if module.disable_adapters else [name for name in module.active_adapters if name in module.lora_A]
        adapters = [
            LoRA(
                module.lora_A[name].weight,
                expert_major(module.lora_B[name].weight, module.num_experts),
                float(module.scaling[name]),
            )
            for name in active
        ]
        if adapters:
            found[module.parameter_name] = _joined(adapters, module, active)
        module = module.base_layer
    return module, found


def _joined(adapters: list[LoRA], module: Any, names: list[str]) -> LoRA:
    if len(adapters) == 1:
        return adapters[0]
    try:
        return LoRA.joined(adapters, module.num_experts)
    except ValueError as error:
        raise ValueError(f"{module.parameter_name} with {', '.join(names)}: {error}") from None


def _times(B: Tensor, ratio: float) -> Tensor:
    return B.to(torch.promote_types(B.dtype, torch.float32)) * ratio
