"""Memory that candidates run in: what they allocate, and red zones, bytes that nothing may read or write.

A load whose mask was lost reads a red zone and spreads NaN, a store whose mask was lost damages one, and an element of
fresh memory that nothing wrote stays NaN.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mxref.verification.arithmetic.tensor_bytes import bytes_of
from mxref.verification.candidates.answer import Written
from mxref.verification.cases.case import Sample

_EMPTY = {torch.empty, torch.empty_like, Tensor.new_empty}
_FRESH = _EMPTY | {torch.zeros, torch.zeros_like, torch.full, torch.full_like, Tensor.new_zeros, Tensor.clone}
"""What allocates memory, or copies into fresh memory, for kernels to work on; some of it uninitialised."""
_ZONE_ROWS = 256  # a tile that overshoots by its whole height still lands in the zone
_ZONE = (1 << 12, 1 << 20)  # least and most elements of one zone
_FRESH_ZONE = 1 << 14  # elements on either side of an allocation: more than one tile's rows of any case here


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


class RedZone:
    """One operand in the middle of a larger buffer, `inside`, with what the buffer held at first."""

    def __init__(self, operand: Tensor, poison: float) -> None:
        width = operand.shape[-1] if operand.ndim else 1
        zone = min(max(_ZONE_ROWS * width, _ZONE[0]), _ZONE[1])
        zone += -zone % 256  # the operand keeps its alignment
        self._buffer = torch.full((zone + operand.numel() + zone,), poison, dtype=operand.dtype, device=operand.device)
        self.inside = self._buffer[zone : zone + operand.numel()].view(operand.shape)
        self.inside.copy_(operand.detach())
        self.numel, self._zone = operand.numel(), zone
        self._before = bytes_of(self._buffer).clone()

    def written(self, place: str) -> Written:
        """Bytes that differ from what was there at first: inside the operand, and around it."""
        different = (bytes_of(self._buffer) != self._before).sum(1)
        inner = int(different[self._zone : self._zone + self.numel].sum())
        return Written(place, self.numel, inner, int(different.sum()) - inner)


def between_red_zones(sample: Sample) -> tuple[Sample, dict[str, RedZone]]:
    """The sample with every operand between two red zones, and these by operand.

    Around numbers lies NaN, around packed weights and scales 0xFF (code −6, scale NaN), around index tensors the first
    value out of range: a position that would reach into a zone, the sentinel's id, one row too many.
    """
    poison: dict[str, float] = {
        "packed": 0xFF,
        "scales": 0xFF,
        "sorted_expert_idxs": sample.problem.E,
        "sorted_scattered_idxs": sample.problem.P,
        "expert_offsets": sample.problem.P + 1,
    }
    zones: dict[str, RedZone] = {}

    def place(name: str, operand: Tensor) -> Tensor:
        zones[name] = RedZone(operand, poison.get(name, float("nan")))
        return zones[name].inside

    return sample.mapped(place), zones


class FreshRedZones(Allocations):
    """While active, what Python code allocates or clones lies between red zones, full of garbage."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []

    def place(self, fresh: Tensor) -> Tensor:
        """Garbage, between garbage."""
        size = fresh.numel()
        self._buffers.append(buffer := _garbage(size + 2 * _FRESH_ZONE, fresh))
        return buffer[_FRESH_ZONE : _FRESH_ZONE + size].view(fresh.shape)

    def written(self) -> Written:
        """What was written outside a tensor, the first of them by its dtype and size."""
        for buffer in self._buffers:
            outside = torch.cat([buffer[:_FRESH_ZONE], buffer[-_FRESH_ZONE:]])
            intact = bytes_of(outside) == bytes_of(_garbage(outside.numel(), outside))
            if not intact.all():
                size = buffer.numel() - 2 * _FRESH_ZONE
                return Written("fresh memory", 0, 0, int((~intact).sum()), f"a {buffer.dtype} tensor of {size}")
        return Written("fresh memory", 0, 0, 0)


def _garbage(size: int, like: Tensor) -> Tensor:
    """Elements that no computation should ever meet: the largest integers, and a NaN that none results in."""
    if like.is_floating_point():
        return torch.full((size * like.element_size(),), 0xFF, dtype=torch.uint8, device=like.device).view(like.dtype)
    largest = True if like.dtype == torch.bool else torch.iinfo(like.dtype).max
    return torch.full((size,), largest, dtype=like.dtype, device=like.device)
