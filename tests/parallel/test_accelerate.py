"""Packed models under accelerate's FSDP2 plugin: the bits of one process, whoever loads and whoever adapts."""

from __future__ import annotations

import accelerated
import pytest
import torch
import world

RANKS = 2


@pytest.mark.parametrize("efficient", [False, True], ids=["loaded by all", "cpu_ram_efficient_loading"])
@pytest.mark.parametrize("by_peft", [False, True], ids=["own adapters", "PEFT"])
def test_step(by_peft: bool, efficient: bool) -> None:
    """A rank's part is what one process computes, and the mean of two is exact but for one rounding."""
    own = []
    for rank in range(RANKS):
        model = accelerated.adapted(by_peft)
        accelerated.loss_of(model, rank).backward()
        own.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    mean = {name: (own[0][name] + own[1][name]) / RANKS for name in own[0]}
    for name, parameter in model.named_parameters():
        parameter.grad = mean.get(name)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.125).step()
    found = world.run(accelerated.step, RANKS, by_peft, efficient)
    for run in found:
        assert run["gradients"].keys() == mean.keys()
        assert len(mean) == (6 if by_peft else 4)
        for name, value in mean.items():
            assert torch.equal(run["gradients"][name], value), name
    assert found[0]["state"].keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(found[0]["state"][name], value), name
