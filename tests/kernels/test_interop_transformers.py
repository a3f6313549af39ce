"""transformers' experts modules on the kernels: the registered implementation, and packed experts in their place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from gpt_oss_checkpoint import make_gpt_oss_checkpoint
from moe_models import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, assert_near, make, tiny_gpt_oss
from safetensors.torch import save_file
from torch import nn
from transformers import GptOssForCausalLM, Mxfp4Config

from mxref import decode_mxfp4, encode_mxfp4
from mxref.checkpoints.gpt_oss import write_expert_weights
from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.packing import experts_modules, pack_experts
from mxref.kernels.models.stacks import PROJECTIONS
from mxref.kernels.models.torchao import mxfp4_param
from mxref.kernels.models.transformers import NAME, use_mxref_experts

FAMILIES = ("gpt_oss", "qwen3_experts", "deepseek_v4")
TOKENS = 5


def dequantise_(experts: nn.Module) -> nn.Module:
    """Put every expert weight on the MXFP4 grid, in place."""
    for name in PROJECTIONS:
        parameter = getattr(experts, name)
        rows = parameter.mT if experts.is_transposed else parameter
        grid = decode_mxfp4(encode_mxfp4(rows.contiguous()), parameter.dtype)
        parameter.data = grid.mT.contiguous() if experts.is_transposed else grid
    return experts


def routed(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, HIDDEN, generator=generator, requires_grad=True)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    gates = torch.rand(TOKENS, TOP_K, generator=generator, requires_grad=True)
    return x, index, gates


def outcome(experts: nn.Module, x: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> list[torch.Tensor]:
    y = experts(x, index, gates)
    return [y, *torch.autograd.grad(y, (x, gates), torch.ones_like(y) + y.detach())]


@pytest.mark.parametrize("family", FAMILIES)
def test_registered_implementation(family: str) -> None:
    experts = make(family)
    expected = outcome(experts, *routed())
    experts.config._experts_implementation = NAME
    for got, value in zip(outcome(experts, *routed()), expected, strict=True):
        assert_near(got, value)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_experts(family: str) -> None:
    holder = nn.ModuleDict({"experts": dequantise_(make(family))})
    expected = outcome(holder["experts"], *routed())
    pack_experts(holder, rank=0)
    packed = holder["experts"]
    assert isinstance(packed, PackedExperts)
    assert all(not parameter.is_floating_point() or "bias" in name for name, parameter in packed.state_dict().items())
    for got, value in zip(outcome(packed, *routed()), expected, strict=True):
        assert_near(got, value)


def test_expert_parallel_sentinels() -> None:
    """A slot of a foreign expert counts as one whose gate is zero, and its gate takes no gradient."""
    experts = make("qwen3_experts")
    experts.config._experts_implementation = NAME
    x, index, gates = routed()
    off = gates.detach().clone()
    off[0, 0] = 0
    expected_y, expected_dx, expected_dgates = outcome(experts, x, index, off.requires_grad_())
    index[0, 0] = EXPERTS
    y, dx, dgates = outcome(experts, x, index, gates)
    assert_near(y, expected_y)
    assert_near(dx, expected_dx)
    assert dgates[0, 0] == 0
    expected_dgates[0, 0] = 0
    assert_near(dgates, expected_dgates)


def test_torchao_parameters_stay_as_they_are() -> None:
    holder = nn.ModuleDict({"experts": make("qwen3_experts")})
    weights = {name: encode_mxfp4(getattr(holder["experts"], name)) for name in PROJECTIONS}
    for name, stack in weights.items():
        setattr(holder["experts"], name, mxfp4_param(stack))
    holder["experts"].config._experts_implementation = NAME
    before = outcome(holder["experts"], *routed())
    pack_experts(holder, rank=0)
    for name, stack in weights.items():
        assert torch.equal(holder["experts"].packed_weights(name).packed, stack.packed)
    packed: Any = holder["experts"]
    packed._activation = replace(packed._activation, form=None)  # before, it was the module's own function too
    for got, value in zip(outcome(packed, *routed()), before, strict=True):
        assert torch.equal(got, value)


def test_a_whole_model_from_a_checkpoint(tmp_path: Path) -> None:
    tensors = make_gpt_oss_checkpoint(tmp_path, sharded=True, layers=1, intermediate=32)
    model = GptOssForCausalLM.from_pretrained(tmp_path, quantization_config=Mxfp4Config(dequantize=True)).float()
    model.requires_grad_(False)
    ids = torch.arange(7)[None]
    expected = model(ids).logits
    use_mxref_experts(model)
    assert model.config._experts_implementation == NAME
    assert_near(model(ids).logits, expected)
    assert pack_experts(model, tmp_path, rank=4) is model
    got = model(ids).logits
    assert_near(got, expected)
    state = model.state_dict()
    for name, tensor in tensors.items():
        if name.endswith(("_blocks", "_scales")):
            assert torch.equal(state[name], tensor)
    got.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(trained) == 4
    assert all("_lora_" in name for name in trained)


def test_dense_weights_may_lie_on_the_meta_device(tmp_path: Path) -> None:
    source = tiny_gpt_oss()
    name = "model.layers.0.mlp.experts"
    experts = source.get_submodule(name)
    weights = {f"{name}.{p}": encode_mxfp4(getattr(experts, p).mT.contiguous()) for p in PROJECTIONS}
    biases = {f"{name}.{p}": getattr(experts, f"{p}_bias").detach() for p in PROJECTIONS}
    write_expert_weights(tmp_path / "model.safetensors", weights, biases)
    empty = tiny_gpt_oss().to("meta")
    pack_experts(empty, tmp_path, rank=0)
    packed = empty.get_submodule(name)
    assert not any(tensor.is_meta for tensor in packed.parameters())
    pack_experts(source, rank=0)
    for key, expected in source.get_submodule(name).state_dict().items():
        assert torch.equal(packed.get_parameter(key), expected), key


def test_bf16_activations_and_autocast() -> None:
    holder = nn.ModuleDict({"experts": make("gpt_oss")})
    pack_experts(holder, rank=2)
    x, index, gates = routed()
    expected = holder["experts"](x, index, gates)
    half = holder["experts"](x.bfloat16(), index, gates.bfloat16())
    assert half.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = holder["experts"](x, index, gates)
    assert mixed.dtype == torch.float32
    for got in (half.float(), mixed):
        assert not torch.equal(got, expected)
        torch.testing.assert_close(got, expected, rtol=0, atol=0.05 * float(expected.detach().abs().max()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_up_proj": None}, "no stacked gate_up_proj"),
        ({"has_gate": False}, "no stacked gate_up_proj"),
        ({"has_post_expert_norm": True}, "normalises"),
        ({"down_proj": torch.zeros(EXPERTS, HIDDEN, INTERMEDIATE, dtype=torch.int8)}, r"down_proj is torch\.int8"),
    ],
)
def test_what_is_not_covered_says_so(change: dict[str, Any], message: str) -> None:
    experts = make("qwen3_experts")
    for name, value in change.items():
        setattr(experts, name, nn.Parameter(value, requires_grad=False) if isinstance(value, torch.Tensor) else value)
    with pytest.raises(TypeError, match=message):
        pack_experts(nn.ModuleDict({"experts": experts}))


def test_models_without_stacked_experts_say_so() -> None:
    with pytest.raises(ValueError, match="has no experts module"):
        experts_modules(nn.ModuleDict({"mlp": nn.Linear(2, 2)}))


def test_the_state_dict_is_a_gpt_oss_checkpoint(tmp_path: Path) -> None:
    model = pack_experts(tiny_gpt_oss(), rank=0)
    expected = model(torch.arange(5)[None]).logits
    config = model.config
    config.quantization_config = {"quant_method": "mxfp4"}
    config.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    dequantise = Mxfp4Config(dequantize=True)
    again = GptOssForCausalLM.from_pretrained(tmp_path, quantization_config=dequantise, dtype=torch.float32)
    assert_near(again.float()(torch.arange(5)[None]).logits, expected)


def test_a_deepseek_v4_checkpoint(tmp_path: Path) -> None:
    experts = make("deepseek_v4")
    gate_up, down = (encode_mxfp4(getattr(experts, name)) for name in PROJECTIONS)
    tensors = {}
    for e in range(EXPERTS):
        half = gate_up.N // 2
        parts = {"w1": (gate_up, 0, half), "w3": (gate_up, half, gate_up.N), "w2": (down, 0, down.N)}
        for part, (stack, start, end) in parts.items():
            stem = f"layers.3.ffn.experts.{e}.{part}"
            tensors[f"{stem}.weight"] = stack.packed[e, start:end].view(torch.int8).clone()
            tensors[f"{stem}.scale"] = stack.scales[e, start:end].view(torch.float8_e8m0fnu).clone()
    save_file(tensors, tmp_path / "model.safetensors")
    mlp = nn.ModuleDict({"experts": dequantise_(experts)})
    expected = outcome(experts, *routed())
    root = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleDict({"3": nn.ModuleDict({"mlp": mlp})})})})
    pack_experts(root, tmp_path, rank=0)
    for got, value in zip(outcome(mlp["experts"], *routed()), expected, strict=True):
        assert_near(got, value)


def test_adapters_of_plain_peft_on_dense_experts_say_so() -> None:
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    model = peft.get_peft_model(nn.ModuleDict({"experts": make("qwen3_experts")}), config)
    with pytest.raises(TypeError, match="wrapped by PEFT already"):
        pack_experts(model)
    experts = model.base_model.model["experts"]
    experts.base_layer.config._experts_implementation = NAME
    with pytest.raises(ValueError, match="or through a PEFT adapter"):
        experts(*routed())


def test_trainable_dense_weights_say_so() -> None:
    model = tiny_gpt_oss().requires_grad_(True)
    with pytest.raises(ValueError, match=r"mlp\.experts\.gate_up_proj requires a gradient"):
        use_mxref_experts(model)


def test_a_checkpoint_of_another_size_says_so(tmp_path: Path) -> None:
    make_gpt_oss_checkpoint(tmp_path, layers=1)
    with pytest.raises(ValueError, match="the model needs"):
        pack_experts(tiny_gpt_oss(), tmp_path)
