"""Experts in parallel under FSDP2: on every mesh the step of one process, also through a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mesh_training
import pytest
import torch
import world
from parallel_models import Batch, integer_experts

from mxref.kernels.models.adapter_files import load_adapters

MESHES = pytest.mark.parametrize(
    ("shape", "num_experts"), [((2,), 3), ((2, 2), 4), ((2, 2), 5)], ids=["ep of 2", "fsdp × ep", "uneven"]
)


def one_process(num_experts: int, seeds: list[int]) -> dict[str, Any]:
    """The state after a step of SGD on the mean of these batches' losses; loss and dx of each; the gradients' norm."""
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
    return {"state": model.state_dict(), "losses": losses, "dx": [b.x.grad for b in batches], "norm": norm}


@MESHES
@pytest.mark.parametrize("exchange", ["all-to-all", "sum"])
def test_step(shape: tuple[int, ...], num_experts: int, exchange: str) -> None:
    ranks, copies = torch.Size(shape).numel(), 1 if exchange == "all-to-all" else shape[-1]
    expected = one_process(num_experts, list(range(ranks // copies)))
    found = world.run(mesh_training.step, ranks, num_experts, shape, exchange)
    assert found[0]["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        assert torch.equal(found[0]["state"][name], value), name
    for rank, run in enumerate(found):
        assert torch.equal(run["loss"], expected["losses"][rank // copies])
        assert torch.equal(run["x"], expected["dx"][rank // copies])
        assert torch.equal(run["norm"], found[0]["norm"])
        torch.testing.assert_close(run["norm"].double(), expected["norm"], rtol=1e4 * 2**-24, atol=0)
        assert run["clipped"] <= mesh_training.MAX_NORM * (1 + 2**-10) < run["norm"]


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 2)], ids=["ep of 1", "ep of 3", "fsdp × ep"])
def test_training_resumes_on_another_mesh(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Five experts, cut 3 + 2 when they are saved, bytes, adapters and moments."""
    world.run(mesh_training.train, 2, str(tmp_path), 5, (2,), False, [1.0, -2.0])
    expected = world.run(mesh_training.train, 1, str(tmp_path / "whole"), 5, (1,), False, [1.0, -2.0, 4.0])[0]
    found = world.run(mesh_training.train, torch.Size(shape).numel(), str(tmp_path), 5, shape, True, [4.0])[0]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@MESHES
def test_adapters_are_saved_whole(tmp_path: Path, shape: tuple[int, ...], num_experts: int) -> None:
    world.run(mesh_training.save, torch.Size(shape).numel(), str(tmp_path), num_experts, shape)
    model = mesh_training.Model(num_experts)
    model.layers[0].experts = integer_experts(num_experts, rank=0)
    load_adapters(model, tmp_path)
    for name, value in mesh_training.Model(num_experts).state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
