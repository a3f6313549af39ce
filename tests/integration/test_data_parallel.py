"""Packed experts on two processes, replicated or sharded: the mean gradient, and untouched weights."""

from __future__ import annotations

import ddp_training
import pytest
import torch
import world
from moe_models import packed_experts
from torch import distributed

PROCESSES = 2


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("sharded", [False, True], ids=["DistributedDataParallel", "fully_shard"])
def test_two_processes_train_as_one(sharded: bool) -> None:
    """Every step's gradient is the mean of the processes' own; half of the experts sees one process's tokens only."""
    (expected,) = world.run(ddp_training.alone, 1, PROCESSES)
    packed = {name: p for name, p in packed_experts().named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == 4
    for run in world.run(ddp_training.train, PROCESSES, sharded):
        for step, (got, mean) in enumerate(zip(run["gradients"], expected["gradients"], strict=True)):
            assert got.keys() == mean.keys()
            assert len(mean) == 4
            for name in mean:
                assert torch.equal(got[name], mean[name]), (step, name)
        assert run["state"].keys() == expected["state"].keys()
        for name, tensor in expected["state"].items():
            assert torch.equal(run["state"][name], tensor), name
            assert name not in packed or torch.equal(tensor, packed[name]), name
