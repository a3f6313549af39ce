"""`HFScatterMoEGatedMLP` against the blocks' own forward: routers, shared experts, adapters, dense and packed."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from moe_models import EXPERTS, HIDDEN, TOP_K, assert_near, make
from torch import nn

from mxref import decode_mxfp4, encode_mxfp4
from mxref.kernels.models.experts import PROJECTIONS
from mxref.kernels.models.moe_block import (
    HFScatterMoEGatedMLP,
    expert_major,
    sigmoid_topk,
    softmax_topk,
    unwrap_adapters,
)
from mxref.kernels.models.packing import pack_experts

BLOCKS = ("qwen2_moe", "qwen3_moe", "deepseek_v3")
TARGETS = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]


def hidden(seed: int = 2) -> torch.Tensor:
    return torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def outcome(forward: Any, x: torch.Tensor, parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    y = forward(x)
    return [y, *torch.autograd.grad(y, (x, *parameters), torch.ones_like(y) + y.detach())]


def on_grid(block: Any) -> Any:
    for name in PROJECTIONS:
        parameter = getattr(block.experts, name)
        parameter.data = decode_mxfp4(encode_mxfp4(parameter.data), parameter.dtype)
    return block


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("family", BLOCKS)
def test_equals_the_block(family: str, packed: bool) -> None:
    block: Any = on_grid(make(family))
    block.gate.requires_grad_(True)
    router = list(block.gate.parameters())
    expected = outcome(block, hidden(), router)
    if packed:
        pack_experts(block, rank=0)
    got = outcome(lambda x: HFScatterMoEGatedMLP.forward(block, x), hidden(), router)
    for ours, theirs in zip(got, expected, strict=True):
        assert_near(ours, theirs)


@pytest.mark.parametrize("family", BLOCKS)
def test_peft_on_experts_and_router(family: str) -> None:
    holder = nn.ModuleDict({"mlp": make(family)})
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=TARGETS, init_lora_weights=False)
    model = peft.get_peft_model(holder, config)
    block = model.base_model.model["mlp"]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(parameters) == 6
    expected = outcome(block, hidden(), parameters)
    got = outcome(lambda x: HFScatterMoEGatedMLP.forward(block, x), hidden(), parameters)
    for ours, theirs in zip(got, expected, strict=True):
        assert_near(ours, theirs)
    with model.disable_adapter():
        assert_near(HFScatterMoEGatedMLP.forward(block, hidden()), block(hidden()))


def test_a_router_that_gives_logits_only() -> None:
    block: Any = make("qwen3_moe")
    expected = block(hidden())
    gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
    gate.weight = block.gate.weight
    block.gate, block.top_k, block.norm_topk_prob = gate, TOP_K, True
    assert_near(HFScatterMoEGatedMLP.forward(block, hidden()), expected)
    block.top_k = None
    with pytest.raises(TypeError, match="has no top_k"):
        HFScatterMoEGatedMLP.forward(block, hidden())


def test_sigmoid_router_that_gives_logits_only() -> None:
    block: Any = make("deepseek_v3")
    expected = block(hidden())
    old = block.gate
    block.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
    block.gate.weight = old.weight
    block.top_k, block.n_group, block.topk_group = TOP_K, old.num_group, old.topk_group
    block.norm_topk_prob, block.routed_scaling_factor = old.norm_topk_prob, old.routed_scaling_factor
    block.e_score_correction_bias = old.e_score_correction_bias
    assert_near(HFScatterMoEGatedMLP.forward(block, hidden()), expected)


def test_routers_by_hand() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    gates, experts = softmax_topk(logits, 2, normalise=True)
    assert experts.tolist() == [[1, 2]]
    torch.testing.assert_close(gates, torch.softmax(torch.tensor([[2.0, 1.0]]), -1))
    gates, experts = sigmoid_topk(logits, 1, torch.tensor([9.0, 0, 0]), normalise=False, routed_scaling=2.0)
    assert experts.tolist() == [[0]]
    assert gates.tolist() == [[1.0]]


def test_layout_of_b() -> None:
    """PEFT's column ρ·E + e is ours at e·r + ρ."""
    E, r, N = 3, 2, 4
    B = torch.arange(N * E * r).reshape(N, r * E)
    ours = expert_major(B, E)
    for e in range(E):
        for rho in range(r):
            assert torch.equal(ours[:, e * r + rho], B[:, rho * E + e])


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match="no gate and experts"):
        HFScatterMoEGatedMLP.forward(make("gpt_oss"), hidden())
    holder = nn.ModuleDict({"mlp": make("qwen3_moe")})
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=TARGETS[:2])
    model = peft.get_peft_model(holder, config)
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=TARGETS[:2]))
    model.base_model.set_adapter(["default", "second"])
    experts = model.base_model.model["mlp"].experts
    with pytest.raises(ValueError, match="not powers of two"):
        unwrap_adapters(experts)
    model.base_model.set_adapter("default")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        unwrap_adapters(experts)
