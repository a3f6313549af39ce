"""Poisoned surroundings: operands between guard zones, and uninitialised memory that is NaN."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxref.verification.sampling import Sample
from mxref.weights import MXWeights

__all__ = ["Fence", "fenced", "uninitialised_memory"]

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
        self._before = self._bytes().clone()

    def _bytes(self) -> Tensor:
        return self._buffer.view(torch.uint8).view(self._buffer.numel(), -1)

    def changed(self) -> tuple[int, int]:
        """Bytes that differ from what was there at first: inside the operand, and around it."""
        different = (self._bytes() != self._before).sum(1)
        inner = int(different[self._zone : self._zone + self.numel].sum())
        return inner, int(different.sum()) - inner


def fenced(sample: Sample) -> tuple[Sample, dict[str, Fence]]:
    """The sample with every operand between two poisoned zones, and these fences by operand.

    Around numbers lies NaN, around packed weights and scales 0xFF (code −6, scale NaN), around index tensors the first
    value out of range: a position that would reach into a zone, the sentinel's id, one row too many.
    """
    problem = sample.problem
    poison: dict[str, float] = {
        "sorted_expert_idxs": problem.E,
        "sorted_scattered_idxs": problem.P,
        "expert_offsets": problem.P + 1,
    }
    fences: dict[str, Fence] = {}

    def fence(name: str, operand: Tensor, value: float = float("nan")) -> Tensor:
        fences[name] = Fence(operand, value)
        return fences[name].inside

    replaced: dict[str, Any] = {}
    for name, operand in problem.arguments().items():
        if isinstance(operand, MXWeights):
            packed, scales = fence("packed", operand.packed, 0xFF), fence("scales", operand.scales, 0xFF)
            replaced[name] = replace(operand, packed=packed, scales=scales)
        elif isinstance(operand, Tensor):
            replaced[name] = fence(name, operand, poison.get(name, float("nan")))
    return Sample(sample.case, replace(problem, **replaced), fence("grad_out", sample.grad_out)), fences


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
