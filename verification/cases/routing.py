"""The router's choices that cases ask for."""

from __future__ import annotations

import torch
from torch import Tensor

from mxref.verification.cases.case import Case

__all__ = ["draw_routing"]


def draw_routing(case: Case, draw: torch.Generator) -> Tensor:
    """The router's choice, int64 [tokens, top_k]: distinct experts a token, unless one expert takes everything.

    Raises:
        ValueError: the routing leaves fewer experts than top_k.
    """
    E, shape = case.experts, (case.tokens, case.top_k)
    if case.routing == "one_expert":
        return torch.full(shape, E // 2)
    allowed = torch.arange(E)
    if case.routing == "empty_experts":
        allowed = allowed[(allowed != 0) & (allowed != E // 2) & (allowed != E - 1)]
    elif case.routing == "ten_active":
        allowed = torch.randperm(E, generator=draw)[:10]
    scores = torch.rand(case.tokens, allowed.numel(), generator=draw)
    choice = allowed[scores.argsort(1)[:, : case.top_k]]
    if choice.shape != shape:
        raise ValueError(f"top_k is {case.top_k}; {case.name} leaves {allowed.numel()} experts to choose from")
    if case.routing == "sentinels":
        foreign = torch.randint(0, 3, shape, generator=draw)
        away = torch.rand(shape, generator=draw) < 0.25
        choice = torch.where(away, torch.tensor([-1, E, E + 7])[foreign], choice)
    return choice
