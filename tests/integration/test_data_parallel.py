"""Packed experts on two processes (gloo), replicated or sharded: the mean gradient, and untouched weights."""

from __future__ import annotations

import ddp_training
import pytest
import torch
import world
from moe_models import packed_experts
from torch import Tensor, distributed

PROCESSES = 2


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("sharded", [False, True], ids=["DistributedDataParallel", "fully_shard"])
def test_two_processes_train_as_one(sharded: bool) -> None:
    """Every step's gradient is the mean of the processes' own; half of the experts sees one process's tokens only."""
    runs = world.run(ddp_training.train, PROCESSES, sharded)
    model = packed_experts()
    before = {name: p.clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(ddp_training.STEPS):
        own = [gradients_of(model, process, step) for process in range(PROCESSES)]
        mean = {name: (own[0][name] + own[1][name]) / 2 for name in own[0]}
        assert len(mean) == 4
        for run in runs:
            assert run["gradients"][step].keys() == mean.keys()
            for name, expected in mean.items():
                world.assert_same(run["gradients"][step][name], expected, (step, name))
        for name, parameter in model.named_parameters():
            parameter.grad = mean.get(name)
        optimiser.step()
    for run in runs:
        for name, expected in model.state_dict().items():
            world.assert_same(run["state"][name], expected, name)
        assert len(before) == 4
        assert all(torch.equal(run["state"][name], tensor) for name, tensor in before.items())


def gradients_of(model: torch.nn.Module, process: int, step: int) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = ddp_training.loss_of(model, process, step)
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
