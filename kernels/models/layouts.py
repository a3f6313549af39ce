"""Which layout of packed weights the kernels read fastest in a place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor

from mxref.kernels.device.configs import layout_for
from mxref.kernels.device.launch import architecture
from mxref.weights import MXLayout


def preferred_layout(stored: Tensor, dtype: torch.dtype, N: int) -> MXLayout | None:
    """The layout of [E, K, N] weights that kernels read fastest for rows of `dtype`; None where none reads `stored`."""
    if stored.device.type != "cuda" or isinstance(stored, FakeTensor | DTensor):
        return None
    try:
        return layout_for(architecture(stored.device), dtype, N)
    except RuntimeError:  # a GPU that is too old for the kernels
        return None
