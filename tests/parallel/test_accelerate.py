"""Packed models under accelerate's FSDP2 plugin: the bits of one process, whoever loads and whoever adapts."""

from __future__ import annotations

from pathlib import Path

import accelerated
import pytest
import torch
import world
from moe_models import assert_near
from safetensors.torch import load_file

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
