"""PEFT's own LoRA on a dense expert parameter, as a candidate: what training is without kernels for adapters.

PEFT wraps the module that holds the parameter (`target_parameters`), and at each call puts W + s·BA, rounded to W's
dtype, in W's place; there is no product with A or B alone, and the gradient of every weight is formed for dA and dB.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mxref.verification.candidates.starting_point import layer

_ADAPTERS = "experts.lora_{}.default.weight"


def peft(
    inputs: Tensor,
    expert_weights: Tensor,
    k: int,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    expert_biases: Tensor | None = None,
    gates: Tensor | None = None,
    grouped_in: bool = False,
    grouped_out: bool = False,
    use_fused_dX: bool = False,
    use_fused_gather: bool = False,
) -> Tensor:
    """One call of a model that `get_peft_model` made of plain PyTorch experts, with these operands as its parameters.

    PEFT keeps B rank by rank, [N, r·E], where ours is expert by expert, [N, E·r].

    Raises:
        ImportError: PEFT is not installed.
    """
    E, N = expert_offsets.numel(), lora_B.shape[0]
    r = lora_A.shape[0] // E
    package: Any = import_module("peft")
    config = package.LoraConfig(r=r, lora_alpha=scaling * r, target_modules=[], target_parameters=["experts.weight"])
    # Its own adapters stay on the meta device, undrawn: those of the call take their place.
    model = package.get_peft_model(_Model(expert_weights), config, low_cpu_mem_usage=True)
    named = {"A": lora_A, "B": lora_B.view(N, E, r).mT.reshape(N, r * E)}
    adapters = {f"base_model.model.{_ADAPTERS.format(name)}": x for name, x in named.items()}
    operands = {
        "k": k,
        "sorted_expert_idxs": sorted_expert_idxs,
        "sorted_scattered_idxs": sorted_scattered_idxs,
        "expert_offsets": expert_offsets,
        "expert_biases": expert_biases,
        "gates": gates,
        "grouped_in": grouped_in,
        "grouped_out": grouped_out,
    }
    y: Tensor = torch.func.functional_call(model, adapters, (inputs,), operands)
    return y


peft.mxref_covers = (  # type: ignore[attr-defined]
    "weights=dense, layout of weights=contiguous|transposed|sliced|padded|apart|expanded, "
    "adapters=ordinary|B zero|NaN in A|NaN in B|B zero, NaN in A|Z beyond fp16|V beyond fp16"
)


class _Experts(torch.nn.Module):
    """Frozen experts, [E, K, N], and the layer on them in plain PyTorch."""

    is_transposed = True  # as PEFT calls [E, K, N]; for others it takes [E, N, K]

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, inputs: Tensor, **operands: Any) -> Tensor:
        return layer(inputs, self.weight, **operands)


class _Model(torch.nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.experts = _Experts(weight)

    def forward(self, inputs: Tensor, **operands: Any) -> Tensor:
        y: Tensor = self.experts(inputs, **operands)
        return y
