"""FSDP2 on packed experts: gradients are the mean over ranks bit for bit, and the bytes are never touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sharded_training as training
import torch
import world
from parallel_models import Batch, integer_experts
from torch import Tensor

RANKS = 2


def gradients(seeds: list[int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What one process adds up over these batches, its floating-point parameters in `dtype`."""
    experts = integer_experts(training.EXPERTS).to(dtype)
    for seed in seeds:
        batch = Batch.of(seed, training.EXPERTS)
        if dtype != torch.float32:
            batch = Batch(batch.x.detach().to(dtype), batch.ids, batch.gates.detach().to(dtype), batch.weight)
        batch.loss(experts).backward()
    return {name: p.grad.float() for name, p in experts.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="fp32"),
        pytest.param({"mixed": True}, id="bf16 by policy"),
        pytest.param({"accumulate": True}, id="two batches a step"),
        pytest.param({"recompute": True}, id="checkpointed"),
    ],
)
def test_step(options: dict[str, Any]) -> None:
    found = world.run(
        training.step, RANKS, *(options.get(name, False) for name in ("mixed", "accumulate", "recompute"))
    )
    dtype = torch.bfloat16 if "mixed" in options else torch.float32
    own = [gradients([rank + 10, rank] if "accumulate" in options else [rank], dtype) for rank in range(RANKS)]
    mean = {name: (own[0][name] + own[1][name]) / RANKS for name in own[0]}
    before = dict(integer_experts(training.EXPERTS).named_parameters())
    norm = torch.cat([value.flatten() for value in mean.values()]).double().norm()
    assert norm > training.MAX_NORM
    bound = sum(value.numel() for value in mean.values()) * 2**-24  # γ_n of a sum of squares in fp32, n elements
    for rank, run in enumerate(found):
        assert run["gradients"].keys() == mean.keys()
        assert set(run["held"].values()) == {3 - rank}, "five experts are cut into slices of three and two"
        torch.testing.assert_close(run["norm"].double(), norm, rtol=bound, atol=0)
        for name, expected in mean.items():
            assert expected.any()
            assert torch.equal(run["gradients"][name], expected), name
            factor = training.MAX_NORM / (run["norm"] + 1e-6)
            torch.testing.assert_close(run["clipped"][name], expected * factor, rtol=2**-23, atol=0)
            assert torch.equal(run["state"][name], before[name].detach() - run["clipped"][name])
        for name in before.keys() - mean.keys():
            assert torch.equal(run["state"][name], before[name]), name


@pytest.mark.parametrize("ranks", [1, 4])
def test_training_resumes_on_another_number_of_ranks(tmp_path: Path, ranks: int) -> None:
    """AdamW's moments and the step go through DCP; four ranks leave one of them without an expert."""
    world.run(training.train, 2, str(tmp_path), False, [0, 1])
    [expected] = world.run(training.train, 1, str(tmp_path / "whole"), False, [0, 1, 2])
    for found in world.run(training.train, ranks, str(tmp_path), True, [2]):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
