"""Routing: from the router's top-k choice to rows sorted by expert.

A token's k slots are k routed rows. Row position = token·k + slot; sorting the positions by expert, stably, makes each
expert's rows contiguous. Expert ids outside 0..E−1 are sentinels (another rank owns the row): they sort last and count
for no expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["flatten_sort_count", "get_active_experts", "remap_expert_indices"]


def flatten_sort_count(expert_idxs: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort routed rows by expert.

    Args:
        expert_idxs: integer [M, k], the expert of each token's slots; ids below 0 or at least E are sentinels.
        num_experts: E.

    Returns:
        sorted_expert_idxs: int64 [P], ascending, P = M·k; sentinels are stored as E and come last.
        sorted_scattered_idxs: int64 [P], position token·k + slot of each sorted row, stable within an expert.
        expert_offsets: int64 [E], inclusive cumulative counts; sentinels are not counted.

    Raises:
        TypeError: `expert_idxs` is not an integer tensor.
        ValueError: `expert_idxs` is not [M, k] or `num_experts` is below 1.
    """
    if expert_idxs.is_floating_point() or expert_idxs.dtype == torch.bool:
        raise TypeError(f"expert_idxs is {expert_idxs.dtype}; expected an integer tensor")
    if expert_idxs.ndim != 2:
        raise ValueError(f"expert_idxs has shape {tuple(expert_idxs.shape)}; expected [tokens, top_k]")
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}; expected at least 1")
    flat = expert_idxs.reshape(-1).long()
    flat = torch.where((flat < 0) | (flat >= num_experts), num_experts, flat)
    sorted_expert_idxs, sorted_scattered_idxs = torch.sort(flat, stable=True)
    experts = torch.arange(num_experts, device=flat.device)
    expert_offsets = torch.searchsorted(sorted_expert_idxs, experts, right=True)
    return sorted_expert_idxs, sorted_scattered_idxs, expert_offsets


def get_active_experts(sorted_expert_idxs: Tensor, num_experts: int) -> Tensor:
    """The experts that own at least one row: int64 [a], ascending; sentinels are left out.

    The result's length depends on the data, so on a GPU this call synchronises.
    """
    unique: Tensor = torch.unique(sorted_expert_idxs)
    return unique[(unique >= 0) & (unique < num_experts)].long()


def remap_expert_indices(
    sorted_expert_idxs: Tensor, expert_offsets: Tensor, active_experts: Tensor, num_experts: int
) -> tuple[Tensor, Tensor]:
    """Renumber experts so that only the active ones remain, in order.

    Args:
        sorted_expert_idxs: int [P], ascending, sentinels ≥ E last.
        expert_offsets: int [E], inclusive cumulative counts.
        active_experts: int64 [a], from `get_active_experts`.
        num_experts: E.

    Returns:
        remapped: int64 [P], the index of each row's expert in `active_experts`; sentinels become a.
        offsets: int64 [a], inclusive cumulative counts of the active experts.

    Raises:
        ValueError: `expert_offsets` does not have E entries.
    """
    if expert_offsets.shape != (num_experts,):
        raise ValueError(f"expert_offsets has shape {tuple(expert_offsets.shape)}; expected [{num_experts}]")
    active = active_experts.long()
    table = torch.full((num_experts + 1,), active.numel(), dtype=torch.int64, device=active.device)
    table[active] = torch.arange(active.numel(), device=active.device)
    remapped = table[sorted_expert_idxs.long().clamp(max=num_experts)]
    return remapped, expert_offsets.long()[active]
