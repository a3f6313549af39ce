"""Packed experts on two processes (gloo), replicated or sharded: the mean gradient, and untouched weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ddp_training
import pytest
import torch
from moe_models import packed_experts
from torch import Tensor, distributed, multiprocessing

PROCESSES = 2
LEAVE = 20
"""Seconds that trained processes get to take leave of each other: gloo has been seen to hang there, once."""
TIMEOUT = 180


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("sharded", [False, True], ids=["DistributedDataParallel", "fully_shard"])
def test_two_processes_train_as_one(tmp_path: Path, sharded: bool) -> None:
    """Every step's gradient is the mean of the processes' own; half of the experts sees one process's tokens only."""
    context = multiprocessing.spawn(
        ddp_training.train, (PROCESSES, str(tmp_path), sharded), nprocs=PROCESSES, join=False
    )
    assert context is not None
    results = [tmp_path / f"{process}.pt" for process in range(PROCESSES)]
    deadline, left = time.monotonic() + TIMEOUT, 0.0
    while not context.join(timeout=1):  # re-raises what a process raised; true once all have ended
        if all(path.exists() for path in results):
            left = left or time.monotonic()
            deadline = min(deadline, left + LEAVE)
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            break
    assert all(path.exists() for path in results), f"the processes did not train within {TIMEOUT} s"
    runs: list[dict[str, Any]] = [torch.load(path) for path in results]
    model = packed_experts()
    before = {name: p.clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(ddp_training.STEPS):
        own = [gradients_of(model, process, step) for process in range(PROCESSES)]
        mean = {name: (own[0][name] + own[1][name]) / 2 for name in own[0]}
        assert len(mean) == 4
        for run in runs:
            assert run["gradients"][step].keys() == mean.keys()
            assert all(torch.equal(run["gradients"][step][name], expected) for name, expected in mean.items())
        for name, parameter in model.named_parameters():
            parameter.grad = mean.get(name)
        optimiser.step()
    for run in runs:
        for name, expected in model.state_dict().items():
            assert torch.equal(run["state"][name], expected), name
        assert len(before) == 4
        assert all(torch.equal(run["state"][name], tensor) for name, tensor in before.items())


def gradients_of(model: torch.nn.Module, process: int, step: int) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = ddp_training.loss_of(model, process, step)
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
