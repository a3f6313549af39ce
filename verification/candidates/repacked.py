"""The production kernels on weights in the layout FRAGMENTS.

    mxref gate --kernel mxref.verification.candidates.repacked:layer

Packed weights are repacked in every call, so that whatever the gate asks in a checkpoint's layout is asked of this one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxref import kernels
from mxref.fragments import TILE
from mxref.kernels.device.launch import architecture
from mxref.weights import MXLayout, MXWeights

__all__ = ["layer"]


def layer(*, expert_weights: Tensor | MXWeights, config: kernels.Config | None = None, **operands: Any) -> Tensor:
    """`parallel_linear_lora` of the kernels with `expert_weights` repacked where that is whole tiles; its arguments."""
    if isinstance(expert_weights, MXWeights) and expert_weights.N % TILE == 0:
        expert_weights = expert_weights.repack(MXLayout.FRAGMENTS)
    return kernels.parallel_linear_lora(expert_weights=expert_weights, config=config, **operands)


def _configs(dtype: torch.dtype) -> list[kernels.Config]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return kernels.reachable_configs(architecture(device), dtype, MXLayout.FRAGMENTS)


layer.mxref_configs = _configs  # type: ignore[attr-defined]
