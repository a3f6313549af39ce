"""Experts in parallel under FSDP2: on every mesh the step of one process, also through a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mesh_peft
import mesh_training
import pytest
import torch
import world
from moe_models import assert_near, loss_of
from parallel_models import Batch

from mxref.kernels.models.adapter_files import load_adapters
from mxref.kernels.models.loading import load_packed_model


def one_process(num_experts: int, seeds: list[int]) -> dict[str, Any]:
    """The state after a step of SGD on the mean of these batches' losses; loss and dx of each; the gradients' norm,
    and how far a sum of their squares in fp32 may be from it."""
    model = mesh_training.Model(num_experts)
    batches = [Batch.of(seed, num_experts) for seed in seeds]
    losses = [batch.loss(model) for batch in batches]
    for loss in losses:
        loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad /= len(seeds)
    norm = torch.cat([p.grad.flatten() for p in trained]).double().norm()
    torch.optim.SGD(trained, lr=1.0).step()
    elements = sum(p.numel() for p in trained)
    return {
        "state": model.state_dict(), "losses": losses, "dx": [b.x.grad for b in batches], "norm": norm,
        "γ": elements * 2**-24,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "num_experts", "recompute"),
    [
        pytest.param((2,), 3, True, id="ep of 2, checkpointed"),
        pytest.param((2, 2), 4, False, id="fsdp × ep"),
        pytest.param((2, 2), 5, False, id="fsdp × ep, uneven"),
    ],
)
def test_steps(shape: tuple[int, ...], num_experts: int, recompute: bool) -> None:
    """By all-to-all, and by a sum over the ranks of "ep", which then have the same tokens."""
    ranks = torch.Size(shape).numel()
    found = world.run(mesh_training.steps, ranks, num_experts, shape, recompute)
    for exchange, copies in (("all-to-all", 1), ("sum", shape[-1])):
        expected = one_process(num_experts, list(range(ranks // copies)))
        assert found[0][exchange]["state"].keys() == expected["state"].keys()
        for name, value in expected["state"].items():
            assert torch.equal(found[0][exchange]["state"][name], value), (exchange, name)
        for rank, run in enumerate(run[exchange] for run in found):
            assert torch.equal(run["loss"], expected["losses"][rank // copies])
            assert torch.equal(run["x"], expected["dx"][rank // copies])
            assert torch.equal(run["norm"], found[0][exchange]["norm"])
            torch.testing.assert_close(run["norm"].double(), expected["norm"], rtol=expected["γ"], atol=0)
            assert run["clipped"] <= mesh_training.MAX_NORM * (1 + expected["γ"]) < run["norm"]


def test_training_resumes_on_another_mesh(tmp_path: Path) -> None:
    """Five experts, cut 3 + 2 when they are saved, bytes, adapters and moments."""
    world.run(mesh_training.train, 2, str(tmp_path), 5, (2,), False, [1.0, -2.0])
    expected = world.run(mesh_training.train, 1, str(tmp_path / "whole"), 5, (1,), False, [1.0, -2.0, 4.0])[0]
    for shape in ((1,), (3,), (2, 2)):
        if not world.possible(ranks := torch.Size(shape).numel()):
            continue
        found = world.run(mesh_training.train, ranks, str(tmp_path), 5, shape, True, [4.0])[0]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), (shape, name)


def test_two_groups_save_and_resume_side_by_side(tmp_path: Path) -> None:
    """Each as if it were alone."""
    found = world.run(mesh_training.side_by_side, 4, str(tmp_path), 5, [1.0, -2.0], [4.0])
    for number in (0, 1):
        scales = [(1 + number) * scale for scale in (1.0, -2.0, 4.0)]
        [expected] = world.run(mesh_training.train, 1, str(tmp_path / f"whole {number}"), 5, (1,), False, scales)
        for trained in (found[number], found[number + 2]):
            assert len(trained) == 5
            for name, value in trained.items():
                own = expected[name]
                if name.endswith("_lora_A"):
                    value = value.flatten(0, 1)
                if name.endswith("_lora_B"):
                    value = value.transpose(0, 1).flatten(1)
                assert torch.equal(own, value), name


@pytest.mark.parametrize("shape", [(2,), (2, 2)], ids=["ep of 2", "fsdp × ep"])
def test_saved_once_and_whole(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """A packed checkpoint and PEFT's adapter, which one process loads: every tensor, bytes among them, as it was.

    Before that, up to the order of fp32 sums, losses and mean gradients of one process, its router's among them.
    """
    ranks, whole = torch.Size(shape).numel(), mesh_training.packed_gpt_oss()
    found = world.run(mesh_training.save, ranks, str(tmp_path), shape)
    losses = [loss_of(whole, rank) for rank in range(ranks)]
    torch.stack(losses).mean().backward()
    expected = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    for rank, run in enumerate(found):
        assert_near(run["loss"], losses[rank].detach())
        assert run["gradients"].keys() == expected.keys()
        assert any("router" in name for name in expected)
        for name, value in expected.items():
            gradient = run["gradients"][name]
            if name.endswith("_lora_A"):
                gradient = gradient.flatten(0, 1)
            if name.endswith("_lora_B"):
                gradient = gradient.transpose(0, 1).flatten(1)
            assert_near(gradient, value)
    model = load_packed_model(tmp_path, rank=0)
    load_adapters(model, tmp_path / "adapters")
    assert model.state_dict().keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize(("way", "ranks"), [("FSDP2", 4), ("DDP", 2)])
def test_adapters_of_peft(way: str, ranks: int) -> None:
    """Parameters of all experts on every rank, whose own see a slice of them: the mean over ranks all the same."""
    found = world.run(mesh_peft.steps, ranks, 5, way)
    for exchange, copies in (("all-to-all", 1), ("sum", 2)):
        model = mesh_peft.adapted(5)
        for seed in range(ranks // copies):
            Batch.of(seed, 5).loss(model).backward()
        expected = {name: p.grad / (ranks // copies) for name, p in model.named_parameters() if p.grad is not None}
        assert len(expected) == 4
        for run in found:
            assert run[exchange].keys() == expected.keys()
            for name, value in expected.items():
                assert value.any()
                assert torch.equal(run[exchange][name], value), (exchange, name)
