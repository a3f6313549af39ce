"""What torch does to a module's parameters, done to packed bytes: they stay what they are, or it is refused."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import accelerate
import peft
import pytest
import torch
from accelerate.hooks import attach_align_device_hook
from families import small_model
from moe_models import EXPERTS, HIDDEN, TOP_K, assert_near, make, packed_experts
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mxref.kernels.models import experts as experts_module
from mxref.kernels.models import packing
from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.packing import pack_experts

FAMILIES = ("gpt_oss", "qwen3_experts", "deepseek_v4")
IDS = torch.arange(5)[None]


def call(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(EXPERTS, (5, TOP_K), generator=generator)
    return torch.randn(5, HIDDEN, generator=generator), index, torch.rand(5, TOP_K, generator=generator)


def packed_bytes(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.dtype == torch.uint8}


def assert_same_bytes(got: nn.Module, expected: nn.Module) -> None:
    ours, theirs = packed_bytes(got), packed_bytes(expected)
    assert ours.keys() == theirs.keys() != set()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_frozen_parameters_with_the_experts_leading() -> None:
    experts = packed_experts()
    names = [f"{p}_{part}" for p in ("gate_up_proj", "down_proj") for part in ("blocks", "scales")]
    assert list(packed_bytes(experts)) == names
    assert not list(experts.buffers())
    assert next(experts.parameters()).device.type == "cpu"
    for parameter in packed_bytes(experts).values():
        assert not parameter.requires_grad
        assert parameter.shape[0] == EXPERTS


CASTS: dict[str, Callable[[Any], Any]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to": lambda m: m.to(torch.float64),
    "to device and dtype": lambda m: m.to("cpu", torch.bfloat16),
    "inside another": lambda m: nn.Sequential(m).bfloat16()[0],
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_leave_the_bytes(cast: str) -> None:
    experts = packed_experts()
    again = CASTS[cast](copy.deepcopy(experts))
    assert_same_bytes(again, experts)
    assert again.down_proj_bias.dtype == again.down_proj_lora_A.dtype != torch.float32


@pytest.mark.parametrize("whole", [False, True], ids=["experts", "inside another"])
def test_conversion_to_numbers_is_refused(whole: bool) -> None:
    experts = packed_experts()
    before = copy.deepcopy(experts)
    with pytest.raises(TypeError, match=r"packed experts cannot become torch\.float32"):
        (nn.Sequential(experts) if whole else experts).type(torch.float32)
    assert_same_bytes(experts, before)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_of_other_dtypes_is_refused(assign: bool) -> None:
    experts = packed_experts()
    state = experts.state_dict()
    state["down_proj_scales"] = state["down_proj_scales"].view(torch.float8_e8m0fnu)
    with pytest.raises(TypeError, match=r"down_proj_scales is torch\.float8_e8m0fnu; expected torch\.uint8"):
        packed_experts().load_state_dict(state, assign=assign)
    packed_experts().load_state_dict(experts.state_dict(), assign=assign)


@pytest.mark.parametrize("family", FAMILIES)
def test_pickled_and_copied(family: str) -> None:
    experts = packed_experts(family)
    expected = experts(*call())
    stream = io.BytesIO()
    torch.save(experts, stream)
    stream.seek(0)
    for again in (torch.load(stream, weights_only=False), copy.deepcopy(experts)):
        assert torch.equal(again(*call()), expected)
        assert again is not experts


OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, weight_decay=0.1),
    "AdamW, foreach": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
}


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_optimisers_train_the_adapters_alone(kind: str) -> None:
    experts = packed_experts()
    before = copy.deepcopy(experts)
    optimiser = OPTIMISERS[kind](experts.parameters())
    experts(*call()).square().sum().backward()
    nn.utils.clip_grad_norm_(experts.parameters(), 1.0)
    optimiser.step()
    changed = [name for name, p in experts.named_parameters() if not torch.equal(p, before.get_parameter(name))]
    assert len(changed) == 4
    assert all("_lora_" in name for name in changed)


def test_bytes_take_no_gradient() -> None:
    with pytest.raises(RuntimeError, match="floating point"):
        packed_experts().requires_grad_(True)


def test_without_data_there_are_shapes() -> None:
    experts = packed_experts()
    expected = experts(*call())
    meta = copy.deepcopy(experts).to("meta")
    out = meta(*(x.to("meta") for x in call()))
    assert out.is_meta
    assert out.shape == expected.shape
    with pytest.raises(ValueError, match="expert_weights lies on meta and inputs on cpu"):
        meta(*call())
    with pytest.raises(NotImplementedError, match="no data"):
        meta.to("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, index, gates = (mode.from_tensor(x) for x in call())
        out = experts(x.requires_grad_(), index, gates)
        assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
        assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape
    assert torch.equal(experts(*call()), expected)


def test_packing_without_data_is_refused() -> None:
    meta = make("qwen3_experts").to("meta")
    with FakeTensorMode():
        fake = make("qwen3_experts")
    for experts in (meta, fake):
        with pytest.raises(ValueError, match="has no data"):
            pack_experts(nn.ModuleDict({"experts": experts}))


def test_a_default_device_of_meta_changes_nothing() -> None:
    first, second = (nn.ModuleDict({"experts": make("qwen3_experts")}) for _ in range(2))
    pack_experts(first, rank=0)
    with torch.device("meta"):
        pack_experts(second, rank=0)
        out = second["experts"](*(x.cpu() for x in CALL))
    assert_same_bytes(second, first)
    assert torch.equal(out, first["experts"](*CALL))


CALL = call()


def adapted_model() -> Any:
    packed = pack_experts(small_model("qwen3_moe"), rank=0)
    torch.manual_seed(4)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=targets, init_lora_weights=False)
    return peft.get_peft_model(packed, config).train()


def gradients(model: Any, between: Callable[[Any], None] = lambda model: None) -> dict[str, Tensor]:
    """Of the adapters, with something done to the model between the passes."""
    loss = model(IDS, labels=IDS, use_cache=False).loss
    between(model)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys() != set()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in got.items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    model = adapted_model()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_gradients(gradients(model), gradients(adapted_model()))


def _other(parameter: Tensor) -> Tensor:
    return torch.randint_like(parameter, 100)


def _new_data(model: Any) -> None:
    for parameter in packed_bytes(model).values():
        parameter.data = _other(parameter)


def _new_parameters(model: Any) -> None:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype == torch.uint8:
                module.register_parameter(name, nn.Parameter(_other(parameter), requires_grad=False))


def _freed_and_brought_back(model: Any) -> None:
    for parameter in packed_bytes(model).values():
        stored, storage = parameter.detach().clone(), parameter.untyped_storage()
        size = storage.nbytes()
        storage.resize_(0)
        storage.resize_(size)
        parameter.data.copy_(stored)


@pytest.mark.parametrize("between", [_new_data, _new_parameters, _freed_and_brought_back])
def test_weights_that_are_swapped_between_the_passes(between: Callable[[Any], None]) -> None:
    """As offloading, streaming and sharding swap them: the gradients are those of the forward's bytes."""
    assert_same_gradients(gradients(adapted_model(), between), gradients(adapted_model()))


def test_weights_that_change_in_place_between_the_passes() -> None:
    """As a buffer that the next layer's weights are read into: refused, never the gradients of other weights."""

    def recycled(model: Any) -> None:
        for parameter in packed_bytes(model).values():
            parameter.copy_(_other(parameter))

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(adapted_model(), recycled)


def test_subnormal_numbers_that_are_flushed_are_told() -> None:
    """Set by a library, which changes what the smallest scales decode to, for good where weights are quantised."""
    experts: Any = pack_experts(nn.ModuleDict({"experts": make("qwen3_experts")}), rank=0)["experts"]
    call = torch.randn(3, HIDDEN), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    torch.set_flush_denormal(True)
    try:
        with pytest.warns(RuntimeWarning, match="set_flush_denormal"):
            experts(*call)
        with pytest.warns(RuntimeWarning, match="set_flush_denormal"):
            pack_experts(nn.ModuleDict({"experts": make("qwen3_experts")}), rank=0)
    finally:
        torch.set_flush_denormal(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        experts(*call)


def test_experts_offloaded_by_accelerate() -> None:
    model = adapted_model()
    for module in model.modules():
        if isinstance(module, PackedExperts):
            stored = {name: p.detach().clone() for name, p in module.named_parameters()}
            attach_align_device_hook(module, execution_device="cpu", offload=True, weights_map=stored)
            assert all(parameter.is_meta for parameter in module.parameters())
    assert_same_gradients(gradients(model), gradients(adapted_model()))


def test_a_whole_model_offloaded_by_accelerate() -> None:
    model = pack_experts(small_model("gpt_oss"), rank=2)
    expected = model(IDS).logits
    accelerate.cpu_offload(model, execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_near(model(IDS).logits, expected)


def test_packing_takes_memory_for_one_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, encode = [], packing.encode_mxfp4
    monkeypatch.setattr(packing, "encode_mxfp4", lambda w, mode: shapes.append(w.shape) or encode(w, mode))
    pack_experts(nn.ModuleDict({"experts": make("gpt_oss")}), rank=0)
    assert len(shapes) == 2 * EXPERTS
    assert all(len(shape) == 2 for shape in shapes)


def test_what_trains_after_packing() -> None:
    model = pack_experts(small_model("qwen3_moe").requires_grad_(True), rank=2)
    assert {name.rpartition("_proj_")[2] for name, p in model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    model = pack_experts(small_model("qwen3_moe").requires_grad_(True), rank=0)
    frozen = {name.rpartition(".")[2] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"{p}_{part}" for p in ("gate_up_proj", "down_proj") for part in ("blocks", "scales")}


def test_an_older_peft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_module.metadata, "version", lambda name: "0.18.1")
    with pytest.raises(ImportError, match=r"peft 0\.18\.1 is installed; packed experts need peft >= 0\.21\.0"):
        pack_experts(nn.ModuleDict({"experts": make("gpt_oss")}))
