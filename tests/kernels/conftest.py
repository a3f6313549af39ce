"""Poisoned allocations, and samples whose every product and sum is exact in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from samples import Sample, Spec, draw
from torch import Tensor


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch leaves uninitialised with NaN, or a wild integer, so that an unwritten element shows."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            x = allocate(*args, **kwargs)
            with torch.no_grad():
                return x.fill_(torch.nan if x.is_floating_point() else 77)

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def sample(device: torch.device) -> Callable[..., Sample]:
    """sample(seed=0, **fields of Spec) -> Sample."""

    def make(seed: int = 0, **fields: Any) -> Sample:
        return draw(replace(Spec(), **fields), device, seed)

    return make
