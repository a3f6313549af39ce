"""FSDP2 on packed experts: gradients are the mean over ranks bit for bit, and the bytes are never touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sharded_training as training
import torch
import world
from parallel_models import integer_experts
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from mxref.kernels.parallel import older_torch
from mxref.kernels.parallel.older_torch import bytes_shardable

RANKS = 2


def test_steps() -> None:
    """In fp32, in bf16 by policy, with two batches a step, and checkpointed."""
    options = [{}, {"mixed": True}, {"accumulate": True}, {"recompute": True}]
    before = dict(integer_experts(training.EXPERTS).named_parameters())
    [alone] = world.run(training.alone, 1, options, RANKS)
    for own, *runs in zip(alone, *world.run(training.steps, RANKS, options), strict=True):
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
    for ranks in filter(world.possible, (1, 4)):
        for found in world.run(training.train, ranks, str(tmp_path), True, [2]):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(found[name], value), (ranks, name)


def test_an_older_torch_is_mended_for_as_long_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes then ask for no gradient and are not converted; all else does as before."""
    group: Any = _fsdp_param_group
    before = group.FSDPParam
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    with bytes_shardable():
        mended: Any = group.FSDPParam
    assert group.FSDPParam is before
    assert issubclass(mended, before)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for dtype, gathered in ((torch.uint8, None), (torch.float32, torch.bfloat16)):
        parameter = older_torch._parameter(torch.zeros(2, dtype=dtype))
        assert parameter.requires_grad == dtype.is_floating_point
        part = mended.__new__(mended)
        part.sharded_param = parameter
        part.init_dtype_attrs(policy)
        assert part.param_dtype == gathered


def test_a_newer_torch_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    group: Any = _fsdp_param_group
    before = group.FSDPParam
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    with bytes_shardable():
        assert group.FSDPParam is before
