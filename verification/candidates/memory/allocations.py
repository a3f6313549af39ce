"""What a candidate allocates, put where a guard wants it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Allocations"]

_EMPTY = {torch.empty, torch.empty_like, Tensor.new_empty}
_FRESH = _EMPTY | {torch.zeros, torch.zeros_like, torch.full, torch.full_like, Tensor.new_zeros, Tensor.clone}
"""What allocates memory, or copies into fresh memory, for kernels to work on; some of it uninitialised."""


class Allocations(TorchFunctionMode, ABC):
    """While active, contiguous tensors that Python code allocates or clones lie where `place` puts them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let the call run, then move a fresh tensor."""
        fresh = func(*args, **(kwargs or {}))
        if func not in _FRESH or not isinstance(fresh, Tensor) or not fresh.is_contiguous() or fresh.is_meta:
            return fresh
        inside = self.place(fresh)
        return inside if func in _EMPTY else inside.copy_(fresh.detach())

    @abstractmethod
    def place(self, fresh: Tensor) -> Tensor:
        """Memory for such a tensor, full of what no computation should ever meet; or the tensor itself."""
