"""Collectives of uneven parts in plain torch.distributed; bytes travel, so that no dtype is touched on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup

__all__ = ["as_bytes", "exchanged", "from_bytes", "gathered", "size_of", "summed"]


def size_of(group: ProcessGroup) -> int:
    """Ranks of a group."""
    return dist.get_world_size(group)


def summed(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over the ranks, a tensor of its own."""
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total


def gathered(x: Tensor, group: ProcessGroup) -> list[Tensor]:
    """Every rank's tensor, which differ in their number of rows."""
    counts = _counts(x.shape[0], x.device, group)
    most = max(counts)
    flat = as_bytes(x)
    padded = flat.new_zeros(most, flat.shape[1])
    padded[: flat.shape[0]] = flat
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return [from_bytes(part[:count], x) for part, count in zip(parts, counts, strict=True)]


def exchanged(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup) -> Tensor:
    """Rows to every rank, so many each, for rows from every rank."""
    flat = as_bytes(rows)
    back = flat.new_empty(sum(received), flat.shape[1])
    dist.all_to_all_single(back, flat, list(received), list(sent), group=group)
    return from_bytes(back, rows)


def as_bytes(x: Tensor) -> Tensor:
    """The bytes of each row: uint8 [rows, ..]."""
    return x.new_empty(x.shape).copy_(x).flatten(1).view(torch.uint8)


def from_bytes(flat: Tensor, like: Tensor) -> Tensor:
    """Rows of the form of `like` from their bytes."""
    return flat.contiguous().view(like.dtype).view(flat.shape[0], *like.shape[1:])


def _counts(count: int, device: torch.device, group: ProcessGroup) -> list[int]:
    parts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(size_of(group))]
    dist.all_gather(parts, torch.tensor([count], device=device), group=group)
    return [int(part) for part in parts]
