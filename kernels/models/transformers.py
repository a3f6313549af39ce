"""The kernels as an experts implementation of transformers, under the name "mxref".

    from mxref.kernels.models.transformers import use_mxref_experts
    use_mxref_experts(model)        # checks every MoE layer, then model.set_experts_implementation("mxref")

For dense, frozen weights; packed experts (`mxref.kernels.models.packing.pack_experts`) need no implementation to be
chosen. Importing this module only registers the name.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.integrations.moe import ExpertsInterface

from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.packing import experts_modules
from mxref.kernels.models.routed import Projection, routed_experts
from mxref.kernels.models.stacks import PROJECTIONS
from mxref.kernels.models.torchao import is_mxfp4_param
from mxref.weights import MXWeights

NAME = "mxref"


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, adapters: Any = None
) -> Tensor:
    """The forward of an experts module with dense weights or torchao MXTensors.

    Args:
        self: an experts module that `experts_modules` accepts.
        hidden_states: [M, H].
        top_k_index: [M, k]; ids outside 0..E−1 contribute nothing (expert parallelism).
        top_k_weights: [M, k].
        adapters: `LoRA` by projection.

    Raises:
        ValueError: a dense weight requires a gradient, which the kernels do not compute.
    """
    gate_up, down = (_projection(self, name, adapters) for name in PROJECTIONS)
    return routed_experts(hidden_states, top_k_index, top_k_weights, gate_up, down, self._apply_gate)


def use_mxref_experts(model: Any) -> None:
    """Run a transformers model's experts on these kernels.

    Raises:
        TypeError, ValueError: as `experts_modules`; also if a dense expert weight requires a gradient.
    """
    if any(isinstance(module, PackedExperts) for module in model.modules()):
        raise ValueError("the model's experts are packed and run on these kernels already")
    for name, module in experts_modules(model).items():
        for projection in PROJECTIONS:
            _check_frozen(getattr(module, projection), f"{name}.{projection}")
    model.set_experts_implementation(NAME)


def _projection(module: Any, name: str, adapters: Any) -> Projection:
    weight = getattr(module, name)
    _check_frozen(weight, f"{type(module).__name__}.{name}")
    bias = getattr(module, f"{name}_bias", None)
    lora = (adapters or {}).get(name)
    if is_mxfp4_param(weight):
        packed = MXWeights.from_torchao(weight)
        return Projection(packed.packed, packed.scales, bias, lora)
    return Projection(weight if getattr(module, "is_transposed", False) else weight.mT, None, bias, lora)


def _check_frozen(weight: Tensor, name: str) -> None:
    if weight.requires_grad:
        raise ValueError(
            f"{name} requires a gradient (itself, or through a PEFT adapter added to it); these kernels train adapters "
            "beside frozen weights: call requires_grad_(False) on it, or pack_experts, and see "
            "mxref.kernels.models.peft for PEFT"
        )


ExpertsInterface.register(NAME, experts_forward)
