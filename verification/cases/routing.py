"""The routings that cases ask for."""

from __future__ import annotations

import torch
from torch import Tensor

from mxref.routing import flatten_sort_count
from mxref.verification.cases.case import Case

ABOUT_TILES = (1, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 127, 128, 129, 255, 256, 257)
"""Rows of each expert: as many as a tile may have, one fewer and one more. All are a whole number of tiles, as are the
first eleven."""
_SENTINELS = {
    "a quarter": 0.25, "first half": 0.25, "one": 0.0, "first expert empty": 0.25, "most": 0.875, "all but one": 1.0,
}  # fmt: skip
"""Which rows have no expert here, and how many of them. Most have none where experts are divided among ranks."""
_TALL = 128
"""Rows of a tall tile, and a whole number of others."""


def draw_routing(case: Case, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """sorted_expert_idxs, sorted_scattered_idxs and expert_offsets of a drawn choice, int64.

    Positions need not ascend within an expert, and any id from E on is a sentinel's.
    """
    experts, positions, offsets = flatten_sort_count(draw_choice(case, draw), case.experts)
    if case.position_order == "descending":
        order = torch.argsort(experts * experts.numel() - torch.arange(experts.numel()), stable=True)
        positions = positions[order]
    if case.position_order == "shuffled":
        positions = _shuffled(positions, offsets, draw)
    if case.routing == "far_sentinels":
        far = case.experts + 1 + torch.arange(experts.numel()) * 1000
        if case.call.index == torch.int64:
            far[-2:] = 2**32  # what is left of it in 32 bits is an expert's
        far[-1:] = torch.iinfo(case.call.index).max
        experts = torch.where(experts >= case.experts, far, experts)
    return experts, positions, offsets


def _shuffled(positions: Tensor, offsets: Tensor, draw: torch.Generator) -> Tensor:
    """The positions of each expert, of every sixteen the first and the last where they are, the others in any order."""
    found, begin = positions.clone(), 0
    for end in offsets.tolist():
        for first in range(begin, end, 16):
            inner = slice(first + 1, min(first + 16, end) - 1)
            moved = positions[inner]
            found[inner] = moved[torch.randperm(moved.numel(), generator=draw)]
        begin = end
    return found


def draw_choice(case: Case, draw: torch.Generator) -> Tensor:
    """The router's choice, int64 [tokens, top_k]: distinct experts a token where there are enough of them."""
    E, shape = case.experts, (case.tokens, case.top_k)
    if case.routing == "one_expert":
        return torch.full(shape, 0 if case.call.ends == "expanded" else case.choose("expert", 0, E // 2, E - 1))
    if case.routing == "all_sentinels":
        return torch.full(shape, E)
    if case.routing in ("about_tiles", "whole_tiles"):
        rows = ABOUT_TILES[:E] if case.routing == "about_tiles" else (_TALL,) * E
        own = torch.arange(E + 1).repeat_interleave(torch.tensor((*rows, case.rows - sum(rows))))
        return own[torch.randperm(own.numel(), generator=draw)].view(shape)
    if case.routing == "equal":
        return (torch.arange(case.rows) % E).view(shape)[torch.randperm(case.tokens, generator=draw)]
    allowed = torch.arange(E)
    if case.routing == "empty_experts":
        allowed = allowed[(allowed != 0) & (allowed != E // 2) & (allowed != E - 1)]
    elif case.routing == "ten_active":
        allowed = torch.randperm(E, generator=draw)[:10]
    which = case.choose("sentinels", *_SENTINELS) if case.routing == "sentinels" else "a quarter"
    if which == "first expert empty":
        allowed = allowed[E > 1 :]
    if case.routing == "duplicates" or allowed.numel() < case.top_k:
        choice = allowed[torch.randint(0, allowed.numel(), shape, generator=draw)]
    else:
        scores = torch.rand(case.tokens, allowed.numel(), generator=draw)
        choice = allowed[scores.argsort(1)[:, : case.top_k]]
    if case.routing in ("sentinels", "far_sentinels"):
        foreign = torch.randint(0, 3, shape, generator=draw)
        away = torch.rand(shape, generator=draw) < _SENTINELS[which]
        if which == "first half":
            away[-(-case.tokens // 2) :] = False
        if which == "all but one":
            away.view(-1)[case.rows // 2 :][:1] = False
        if not away.any():
            away.view(-1)[:1] = True
        choice = torch.where(away, torch.tensor([-1, E, E + 7])[foreign], choice)
    return choice
