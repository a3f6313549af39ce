"""Memory that a candidate allocates: where it lies, and what it holds before anything is written."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

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


@contextmanager
def uninitialised_memory(poisoned: bool) -> Iterator[None]:
    """Within this context torch.empty and its kin give NaN, integers their largest value; or what they find.

    This is torch's deterministic mode. It also chooses operators, so the other side of a comparison needs it too: with
    `poisoned=False`.
    """
    mode, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.use_deterministic_algorithms(True, warn_only=True)
            memory.fill_uninitialized_memory = poisoned
            yield
        finally:
            memory.fill_uninitialized_memory = fill
            torch.use_deterministic_algorithms(mode, warn_only=warn)
