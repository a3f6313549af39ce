"""Red zones: operands, and what a candidate allocates, between bytes that nothing may read or write.

A load whose mask was lost reads a red zone and spreads NaN, a store whose mask was lost damages one, and an element of
fresh memory that nothing wrote stays NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxref.verification.arithmetic.tensor_bytes import bytes_of
from mxref.verification.candidates.answer import Written
from mxref.verification.candidates.memory.fresh import Allocations
from mxref.verification.cases.case import Sample

_ZONE_ROWS = 256  # a tile that overshoots by its whole height still lands in the zone
_ZONE = (1 << 12, 1 << 20)  # least and most elements of one zone
_FRESH_ZONE = 1 << 14  # elements on either side of an allocation: more than one tile's rows of any case here


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
