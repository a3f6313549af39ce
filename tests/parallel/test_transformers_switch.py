"""transformers' `DistributedConfig`: packed experts work under it, or say which way does."""

from __future__ import annotations

from pathlib import Path

import distributed_transformers as switch
import peft
import pytest
import torch
import world
from moe_models import assert_near
from tiny_models import tiny_model
from transformers import DistributedConfig
from transformers.distributed.tensor_parallel import resolve_parallel_plans

from mxref.kernels.models.packing import pack_experts
from mxref.kernels.parallel.transformers import distribute_model


@pytest.mark.parametrize(
    ("family", "sizes", "batches", "held"),
    [
        pytest.param("gpt_oss", {"fsdp_size": 2, "ep_size": 2}, 2, 2, id="gpt-oss, every rank its own tokens"),
        pytest.param("qwen3_moe", {"tp_size": 2, "ep_size": 2}, 1, 2, id="qwen3, beside tensor parallelism"),
        pytest.param("qwen3_moe", {"fsdp_size": 4, "ep_size": 2}, 4, 1, id="qwen3, slices sharded further"),
        pytest.param("qwen3_moe", {"tp_size": 2}, 1, 4, id="qwen3, tensor parallelism alone"),
    ],
)
def test_step(family: str, sizes: dict[str, int], batches: int, held: int) -> None:
    """Up to the order of fp32 sums, the losses of one process, and the mean of their gradients."""
    model = switch.packed(family)
    losses = [switch.loss_of(model, batch) for batch in range(batches)]
    torch.stack(losses).mean().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    ranks = sizes.get("fsdp_size", 1) * sizes.get("tp_size", 1)
    for rank, run in enumerate(world.run(switch.step, ranks, family, sizes, batches)):
        assert run["held"] == {held}
        assert_near(run["loss"], losses[rank * batches // ranks].detach())
        assert run["gradients"].keys() == expected.keys()
        for name, value in expected.items():
            assert_near(run["gradients"][name], value)


def test_packing_what_is_divided_already_is_refused(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    for error in world.errors(switch.load_dense, 2, str(tmp_path)):
        assert "is sharded over ranks already; pack the experts first" in error


def test_a_size_that_does_not_divide_the_experts() -> None:
    for error in world.errors(switch.wrong_size, 3, "qwen3_moe"):
        assert "model.layers.0.mlp.experts has 4 experts, which ep_size = 3 does not divide" in error


def test_the_switch_alone_is_refused_by_transformers() -> None:
    """Without `distribute_model`: the plans name dense weights, and packing took them out."""
    model = pack_experts(tiny_model("qwen3_moe"), rank=2)
    with pytest.raises(ValueError, match="does not define an expert-parallel plan"):
        resolve_parallel_plans(model, DistributedConfig(fsdp_size=2, ep_size=2))
    assert not [name for name in model.tp_plan if "experts" in name]
    assert [name for name in model.tp_plan if "q_proj" in name]


def test_adapters_of_peft_are_refused() -> None:
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(target_modules=[], target_parameters=targets)
    model = peft.get_peft_model(pack_experts(tiny_model("qwen3_moe"), rank=0), config)
    with pytest.raises(ValueError, match="carries PEFT's adapters"):
        distribute_model(model.base_model.model, DistributedConfig(fsdp_size=2, ep_size=2))
    with pytest.raises(ValueError, match="has no PackedExperts"):
        distribute_model(tiny_model("qwen3_moe"), DistributedConfig(fsdp_size=2, ep_size=2))
