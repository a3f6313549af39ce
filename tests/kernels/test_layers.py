"""`HFScatterMoEGatedMLP` against the blocks' own forward, dense and packed, with adapters."""

from __future__ import annotations

from types import MethodType
from typing import Any

import peft
import pytest
import torch
from moe_models import HIDDEN, assert_near, make
from torch import nn

from mxref import decode_mxfp4, encode_mxfp4
from mxref.kernels.models.adapters import expert_major, rank_major, unwrap_adapters
from mxref.kernels.models.moe_block import HFScatterMoEGatedMLP
from mxref.kernels.models.packing import pack_experts
from mxref.kernels.models.stacks import PROJECTIONS

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


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_what_a_block_does_around_its_experts_stays(packed: bool) -> None:
    """Jitter in training, which draws random numbers, and a factor of the routed sum, which is the block's own."""
    block: Any = on_grid(make("mixtral"))
    block.jitter_noise = 0.3
    block.train()
    torch.manual_seed(7)
    expected = block(hidden().detach())
    if packed:
        pack_experts(block, rank=0)
    torch.manual_seed(7)
    assert_near(HFScatterMoEGatedMLP.forward(block, hidden().detach()), expected)
    assert float((block.eval()(hidden().detach()) - expected).detach().abs().max()) > 1e-2


def test_in_the_place_of_a_modules_forward() -> None:
    block: Any = make("qwen3_moe")
    expected = block(hidden())
    block.forward = MethodType(HFScatterMoEGatedMLP.forward, block)
    assert_near(block(hidden()), expected)


def test_layout_of_b() -> None:
    """PEFT's column ρ·E + e is ours at e·r + ρ."""
    E, r, N = 3, 2, 4
    B = torch.arange(N * E * r).reshape(N, r * E)
    ours = expert_major(B, E)
    for e in range(E):
        for rho in range(r):
            assert torch.equal(ours[:, e * r + rho], B[:, rho * E + e])


def test_columns_of_b_there_and_back() -> None:
    B = torch.arange(24).reshape(4, 6)
    assert torch.equal(rank_major(expert_major(B, 3), 3), B)
    assert torch.equal(expert_major(rank_major(B, 3), 3), B)
    assert not torch.equal(rank_major(B, 3), expert_major(B, 3))


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="no experts module"):
        HFScatterMoEGatedMLP.forward(make("gpt_oss"), hidden())
    block: Any = make("qwen3_moe")
    block.experts.has_post_expert_norm = True
    with pytest.raises(TypeError, match=r"experts \(Qwen3MoeExperts\) is not covered: it normalises"):
        HFScatterMoEGatedMLP.forward(block, hidden())
    monkeypatch.setattr(type(block), "forward", HFScatterMoEGatedMLP.forward)
    with pytest.raises(TypeError, match="has no forward of its own"):
        make("qwen3_moe")(hidden())
    monkeypatch.undo()
    holder = nn.ModuleDict({"mlp": make("qwen3_moe")})
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=TARGETS[:2])
    model = peft.get_peft_model(holder, config)
    experts = model.base_model.model["mlp"].experts
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        unwrap_adapters(experts)
