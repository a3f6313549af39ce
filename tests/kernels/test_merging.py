"""Merging by quantising again, on request: what the weights become, and that the reported loss is the loss."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from moe_models import assert_near, make, tiny_gpt_oss
from torch import Tensor, nn

from mxref import decode_mxfp4, encode_mxfp4
from mxref.formats import SCALE_MODES
from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.merging import merge_adapters
from mxref.kernels.models.packing import pack_experts
from mxref.kernels.models.peft import get_peft_model
from mxref.kernels.models.stacks import PROJECTIONS

IDS = torch.arange(6)[None]
RANK = 2


def packed_experts(std: float) -> nn.ModuleDict:
    """Experts with their own adapters, B of the given size for every expert but the first."""
    holder = nn.ModuleDict({"experts": make("gpt_oss")})
    torch.manual_seed(1)
    pack_experts(holder, rank=RANK, alpha=3)
    for projection in PROJECTIONS:
        B = holder["experts"].get_parameter(f"{projection}_lora_B")
        nn.init.normal_(B, std=std)
        B.detach()[:, :RANK] = 0
    return holder


def dense(experts: Any, projection: str) -> tuple[Tensor, Tensor]:
    """W and s·B·A, [E, N, K] in fp64."""
    W = decode_mxfp4(experts.packed_weights(projection), torch.float64)
    lora = experts.own_adapters()[projection]
    A, B = (part.detach().double() for part in (lora.A, lora.B))
    E = experts.num_experts
    return W, 1.5 * torch.einsum("erk,ner->enk", A.unflatten(0, (E, -1)), B.unflatten(1, (E, -1)))


def by_block(error: Tensor) -> Tensor:
    return error.square().unflatten(-1, (-1, 32)).sum(-1)


@pytest.mark.parametrize("std", [0.001, 0.01, 0.5])
def test_the_sum_is_quantised_and_the_loss_is_the_loss(std: float) -> None:
    holder = packed_experts(std)
    experts: Any = holder["experts"]
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    sums = {projection: dense(experts, projection) for projection in PROJECTIONS}
    model, losses = merge_adapters(holder)
    assert model is holder
    assert experts.rank == 0
    assert not any("lora" in name for name in experts.state_dict())
    assert [loss.name for loss in losses] == [f"experts.{projection}" for projection in PROJECTIONS]
    for projection, loss in zip(PROJECTIONS, losses, strict=True):
        W, delta = sums[projection]
        again = decode_mxfp4(experts.packed_weights(projection), torch.float64)
        candidates = [decode_mxfp4(encode_mxfp4(W + delta, mode), torch.float64) for mode in SCALE_MODES]
        nearest = torch.stack([by_block(other - W - delta) for other in (W, *candidates)]).amin(0)
        assert torch.equal(by_block(again - W - delta), nearest)
        for name in (f"{projection}_blocks", f"{projection}_scales"):
            assert torch.equal(experts.get_parameter(name)[0], before[name][0])
        error = (again - W - delta).norm()
        torch.testing.assert_close(loss.weights, float(error / (W + delta).norm()))
        torch.testing.assert_close(loss.adapter, float(error / delta.norm()))
        torch.testing.assert_close(loss.kept, float(((again - W) * delta).sum() / delta.square().sum()))
        assert loss.adapter <= 1
        assert f"{loss.kept:.1%}" in str(loss)
    assert all((loss.kept > 0.8) == (std > 0.1) for loss in losses)


def test_an_adapter_without_a_product_leaves_every_byte() -> None:
    holder = packed_experts(0.0)
    before = {name: tensor.clone() for name, tensor in holder.state_dict().items()}
    _, losses = merge_adapters(holder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in holder.state_dict().items())
    assert [(loss.weights, loss.adapter, loss.kept) for loss in losses] == [(0.0, 0.0, 1.0)] * 2


def test_peft_adapters_beside_others() -> None:
    """Experts are quantised again, other layers merge as PEFT merges them, and both adapters that are active count."""
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config: dict[str, Any] = {"target_modules": ["q_proj"], "target_parameters": targets, "init_lora_weights": False}
    model: Any = get_peft_model(pack_experts(tiny_gpt_oss(), rank=0), peft.LoraConfig(r=2, lora_alpha=2, **config))
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=6, **config))
    model.base_model.set_adapter(["default", "second"])
    adapted = model(IDS).logits.detach()
    with model.disable_adapter():
        base = model(IDS).logits.detach()
    merged, losses = merge_adapters(model)
    assert len(losses) == 2
    assert all(loss.name.startswith("base_model.model.model.layers.0.mlp.experts.") for loss in losses)
    assert not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in merged.modules())
    assert isinstance(merged.get_submodule("model.layers.0.mlp.experts"), PackedExperts)
    got = merged(IDS).logits.detach()
    assert float((got - adapted).norm()) < float((got - base).norm())


def test_attention_is_merged_exactly() -> None:
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model: Any = get_peft_model(
        pack_experts(tiny_gpt_oss(), rank=0), peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets)
    )
    for name, parameter in model.named_parameters():
        if "q_proj.lora_B" in name:
            nn.init.normal_(parameter)
    expected = model(IDS).logits
    merged, losses = merge_adapters(model)
    assert {loss.kept for loss in losses} == {1.0}
    assert_near(merged(IDS).logits, expected)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_adapters(pack_experts(tiny_gpt_oss(), rank=0))
