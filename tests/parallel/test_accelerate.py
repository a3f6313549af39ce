"""Packed models under accelerate's FSDP2 plugin: the bits of one process, whoever loads and whoever adapts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerated
import pytest
import torch
import world
from moe_models import assert_near, loss_of
from safetensors.torch import load_file
from torch import Tensor

RANKS = 2


def test_steps() -> None:
    """Loaded by all ranks or by one, with own adapters or PEFT's. A rank's part is what one process computes, and the
    mean of two is exact but for one rounding."""
    ways = [(by_peft, efficient) for by_peft in (False, True) for efficient in (False, True)]
    for (by_peft, efficient), *runs in zip(ways, *world.run(accelerated.steps, RANKS, ways), strict=True):
        model, mean = one_process(by_peft)
        assert len(mean) == (6 if by_peft else 4)
        for run in runs:
            assert run["gradients"].keys() == mean.keys()
            for name, value in mean.items():
                world.assert_same(run["gradients"][name], value, (by_peft, efficient, name))
        assert runs[0]["state"].keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            world.assert_same(runs[0]["state"][name], value, (by_peft, efficient, name))


def one_process(by_peft: bool) -> tuple[Any, dict[str, Tensor]]:
    """The model after a step of SGD by the mean of the ranks' gradients, and that mean."""
    own = []
    for rank in range(RANKS):
        model = accelerated.adapted(by_peft)
        loss_of(model, rank).backward()
        own.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    mean = {name: (own[0][name] + own[1][name]) / RANKS for name in own[0]}
    for name, parameter in model.named_parameters():
        parameter.grad = mean.get(name)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.125).step()
    return model, mean


def test_trainer(tmp_path: Path) -> None:
    """Losses and adapters are those of one process with twice the batch, also after a checkpoint, which is whole."""
    alone = accelerated.trainer_of(accelerated.adapted(by_peft=True), str(tmp_path / "one"), RANKS, accelerated.STEPS)
    alone.train()
    losses = [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
    directory = str(tmp_path / "two")
    first = world.run(accelerated.train, RANKS, directory, None, 2)
    then = world.run(accelerated.train, RANKS, directory, f"{directory}/checkpoint-2", accelerated.STEPS)
    assert first[0]["losses"] + then[0]["losses"][2:] == pytest.approx(losses, rel=1e-5)
    expected = {name: p.detach() for name, p in alone.model.named_parameters() if p.requires_grad}
    for run in then:
        assert run["trained"].keys() == expected.keys()
        for name, value in expected.items():
            assert_near(run["trained"][name], value)
    saved = load_file(tmp_path / "two" / f"checkpoint-{accelerated.STEPS}" / "adapter_model.safetensors")
    assert len(saved) == len(expected)
    for name in expected:
        assert torch.equal(saved[name.replace(".default", "")], then[0]["trained"][name]), name
