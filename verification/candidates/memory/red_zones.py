"""Poisoned surroundings: operands between guard zones, and uninitialised memory that is NaN."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mxref.verification.cases.case import Sample

__all__ = ["Fence", "bytes_of", "fenced", "uninitialised_memory"]

_ZONE_ROWS = 256  # a tile that overshoots by its whole height still lands in the zone
_ZONE = (1 << 12, 1 << 20)  # least and most elements of one zone


class Fence:
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

    def changed(self) -> tuple[int, int]:
        """Bytes that differ from what was there at first: inside the operand, and around it."""
        different = (bytes_of(self._buffer) != self._before).sum(1)
        inner = int(different[self._zone : self._zone + self.numel].sum())
        return inner, int(different.sum()) - inner


def bytes_of(x: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, uint8 [elements, bytes an element]."""
    return x.view(torch.uint8).view(x.numel(), -1)


def fenced(sample: Sample) -> tuple[Sample, dict[str, Fence]]:
    """The sample with every operand between two poisoned zones, and these fences by operand.

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
    fences: dict[str, Fence] = {}

    def fence(name: str, operand: Tensor) -> Tensor:
        fences[name] = Fence(operand, poison.get(name, float("nan")))
        return fences[name].inside

    return sample.mapped(fence), fences


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
