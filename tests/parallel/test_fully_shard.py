"""FSDP2 on packed experts: gradients are the mean over ranks bit for bit, and the bytes are never touched."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sharded_training as training
import torch
import world
from parallel_models import Batch, integer_experts
from torch import Tensor, nn

from mxref.kernels.parallel.sharding import shard_model

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


def test_steps() -> None:
    """In fp32, in bf16 by policy, with two batches a step, and checkpointed."""
    options = [{}, {"mixed": True}, {"accumulate": True}, {"recompute": True}]
    before = dict(integer_experts(training.EXPERTS).named_parameters())
    for option, *runs in zip(options, *world.run(training.steps, RANKS, options), strict=True):
        dtype = torch.bfloat16 if "mixed" in option else torch.float32
        own = [gradients([rank + 10, rank] if "accumulate" in option else [rank], dtype) for rank in range(RANKS)]
        mean = {name: (own[0][name] + own[1][name]) / RANKS for name in own[0]}
        assert len(mean) == 4
        for rank, run in enumerate(runs):
            assert set(run["held"].values()) == {3 - rank}, "five experts are cut into slices of three and two"
            check_step(run, mean, before)


def check_step(run: dict[str, Any], mean: dict[str, Tensor], before: dict[str, Any]) -> None:
    """Gradients are the mean, exact; clipped by their norm, up to rounding a sum of squares; bytes untouched."""
    norm = torch.cat([value.flatten() for value in mean.values()]).double().norm()
    assert norm > training.MAX_NORM
    bound = sum(value.numel() for value in mean.values()) * 2**-24  # γ_n in fp32, n elements
    torch.testing.assert_close(run["norm"].double(), norm, rtol=bound, atol=0)
    assert run["gradients"].keys() == mean.keys()
    for name, expected in mean.items():
        assert expected.any()
        assert torch.equal(run["gradients"][name], expected), name
        factor = training.MAX_NORM / (run["norm"] + 1e-6)
        torch.testing.assert_close(run["clipped"][name], expected * factor, rtol=2**-23, atol=0)
        assert torch.equal(run["state"][name], before[name].detach() - run["clipped"][name])
    for name in before.keys() - mean.keys():
        assert torch.equal(run["state"][name], before[name]), name


def test_at_most_two_layers_are_gathered() -> None:
    """The one that computes, and in the backward pass the next."""
    for counts in world.run(training.gathered_at_a_time, RANKS, 4):
        assert counts[:4] == [1] * 4
        assert len(counts) == 8
        assert max(counts) <= 2


def test_training_resumes_on_another_number_of_ranks(tmp_path: Path) -> None:
    """AdamW's moments and the step go through DCP; four ranks leave one of them without an expert."""
    world.run(training.train, 2, str(tmp_path), False, [0, 1])
    [expected] = world.run(training.train, 1, str(tmp_path / "whole"), False, [0, 1, 2])
    for ranks in (1, 4):
        for found in world.run(training.train, ranks, str(tmp_path), True, [2]):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(found[name], value), (ranks, name)


def test_an_older_torch_is_refused_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    mesh: Any = SimpleNamespace(mesh_dim_names=("fsdp",))
    with pytest.raises(RuntimeError, match=r"torch 2.11.0\+cu130 cannot shard packed experts.*from torch 2.13 on"):
        shard_model(nn.Linear(2, 2), mesh, [])
