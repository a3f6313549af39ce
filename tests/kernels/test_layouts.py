"""Packed experts on a GPU that reads another layout faster: bytes are rearranged in place, and nobody else notices."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload
from families import small_model
from moe_models import EXPERTS, HIDDEN, TOP_K, packed_experts, tiny_gpt_oss
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from mxref import MXLayout, MXWeights, decode_mxfp4
from mxref.kernels.models import stacks as stacks_module
from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.loading import load_packed_model, save_packed_model
from mxref.kernels.models.merging import merge_adapters
from mxref.kernels.models.packing import pack_experts
from mxref.kernels.models.stacks import PROJECTIONS, checkpoint_layout, preferred_layout
from mxref.kernels.models.torchao import selective_expert_weights
from mxref.kernels.parallel.experts import ShardedExperts


@pytest.fixture
def plain() -> PackedExperts:
    """As on any GPU, made before `fragments` is in force."""
    return packed_experts()


@pytest.fixture
def fragments(plain: PackedExperts, monkeypatch: pytest.MonkeyPatch) -> PackedExperts:
    """The same experts, on a CPU that takes itself for a GPU whose kernels read FRAGMENTS, but for rows in fp16."""

    def preferred(stored: Tensor, dtype: torch.dtype, N: int) -> MXLayout:
        return MXLayout.FWD if dtype == torch.float16 or N % 32 else MXLayout.FRAGMENTS

    monkeypatch.setattr(stacks_module, "preferred_layout", preferred)
    experts = packed_experts()
    assert layouts(experts) == [MXLayout.FRAGMENTS] * 2
    return experts


def layouts(model: nn.Module) -> list[MXLayout]:
    packed = [module for module in model.modules() if isinstance(module, PackedExperts)]
    return [module.packed_weights(name).layout for module in packed for name in PROJECTIONS]


def places(model: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys() != set()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())


def step(experts: Any) -> list[Tensor]:
    """Output and gradients of a training step."""
    generator = torch.Generator().manual_seed(1)
    x, gates = torch.randn(5, HIDDEN, generator=generator), torch.rand(5, TOP_K, generator=generator)
    index = torch.randint(EXPERTS, (5, TOP_K), generator=generator)
    y = experts(x.requires_grad_(), index, gates)
    trained = [x, *(p for p in experts.parameters() if p.requires_grad)]
    return [y, *torch.autograd.grad(y.square().sum(), trained)]


def test_the_layout_of_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    here: Any = SimpleNamespace(device=torch.device("cuda", 0))
    chip = "sm_90"
    monkeypatch.setattr(stacks_module, "architecture", lambda device: chip)
    assert preferred_layout(here, torch.bfloat16, 64) == MXLayout.FRAGMENTS
    assert preferred_layout(here, torch.bfloat16, 72) == MXLayout.FWD
    assert preferred_layout(here, torch.float16, 64) == MXLayout.FWD
    chip = "sm_80"
    assert preferred_layout(here, torch.bfloat16, 64) == MXLayout.FWD
    assert preferred_layout(torch.zeros(1), torch.bfloat16, 64) is None

    def too_old(device: torch.device) -> str:
        raise RuntimeError("compute capability (7, 5)")

    monkeypatch.setattr(stacks_module, "architecture", too_old)
    assert preferred_layout(here, torch.bfloat16, 64) is None


def test_a_step_has_the_same_bits(plain: PackedExperts, fragments: PackedExperts) -> None:
    for got, expected in zip(step(fragments), step(plain), strict=True):
        assert torch.equal(got, expected)


def test_a_compiled_step_has_the_same_bits(fragments: PackedExperts) -> None:
    compiled = torch.compile(fragments, backend="aot_eager", fullgraph=True)
    for got, expected in zip(step(compiled), step(fragments), strict=True):
        assert torch.equal(got, expected)


def test_state_is_a_checkpoints(plain: PackedExperts, fragments: PackedExperts) -> None:
    file = io.BytesIO()
    torch.save(fragments.state_dict(), file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=True), plain.state_dict())
    again = packed_experts("gpt_oss")
    for parameter in again.parameters():
        parameter.detach().zero_()
    again.load_state_dict(plain.state_dict())
    assert layouts(again) == [MXLayout.FRAGMENTS] * 2
    for mine, other in zip(again.parameters(), fragments.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_part_of_a_state_leaves_the_rest(plain: PackedExperts, fragments: PackedExperts) -> None:
    state = {"down_proj_blocks": torch.zeros_like(plain.down_proj_blocks)}
    fragments.load_state_dict(state, strict=False)
    assert_same(fragments.state_dict(), plain.state_dict() | state)


def test_copies_and_pickles_know_their_layout(fragments: PackedExperts) -> None:
    file = io.BytesIO()
    torch.save(fragments, file)
    file.seek(0)
    for other in (copy.deepcopy(fragments), torch.load(file, weights_only=False)):
        assert layouts(other) == [MXLayout.FRAGMENTS] * 2
        assert_same(other.state_dict(), fragments.state_dict())
        assert all(map(torch.equal, step(other), step(fragments)))


def test_casts_choose_again_in_place(plain: PackedExperts, fragments: PackedExperts) -> None:
    before = [p.data_ptr() for p in fragments.parameters() if p.dtype == torch.uint8]
    for cast, layout in ((fragments.half, MXLayout.FWD), (fragments.float, MXLayout.FRAGMENTS)):
        cast()
        assert layouts(fragments) == [layout] * 2
    assert [p.data_ptr() for p in fragments.parameters() if p.dtype == torch.uint8] == before
    for name in PROJECTIONS:
        assert torch.equal(decode_mxfp4(fragments.packed_weights(name)), decode_mxfp4(plain.packed_weights(name)))


def test_within_checkpoint_layout_nothing_is_copied(plain: PackedExperts, fragments: PackedExperts) -> None:
    before = places(fragments)
    with checkpoint_layout(fragments):
        state = fragments.state_dict()
        assert {tensor.data_ptr() for tensor in state.values()} == set(before)
        assert_same(state, plain.state_dict())
    assert layouts(fragments) == [MXLayout.FRAGMENTS] * 2
    assert places(fragments) == before


def test_bytes_of_others_are_left_alone(plain: PackedExperts, fragments: PackedExperts) -> None:
    given = [plain.packed_weights(name) for name in PROJECTIONS]
    before = [(weights.packed.clone(), weights.scales.clone()) for weights in given]
    PackedExperts(*given, torch.relu).arrange(torch.float32)
    for weights, (packed, scales) in zip(given, before, strict=True):
        assert torch.equal(weights.packed, packed)
        assert torch.equal(weights.scales, scales)


@pytest.mark.parametrize("convention", ["gpt-oss", "compressed-tensors"])
def test_saved_bytes_are_those_that_were_loaded(
    convention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacked = convention == "gpt-oss"
    model = tiny_gpt_oss() if stacked else small_model("qwen3_moe")
    save_packed_model(pack_experts(model, rank=0), tmp_path / "plain", convention=convention)
    monkeypatch.setattr(stacks_module, "preferred_layout", lambda *_: MXLayout.FRAGMENTS)
    loaded = load_packed_model(tmp_path / "plain", rank=0)
    assert set(layouts(loaded)) == {MXLayout.FRAGMENTS}
    before = places(loaded)
    save_packed_model(loaded, tmp_path / "again")
    assert_same(*(load_file(tmp_path / name / "model.safetensors") for name in ("again", "plain")))
    assert set(layouts(loaded)) == {MXLayout.FRAGMENTS}
    assert places(loaded) == before
    loaded.save_pretrained(tmp_path / "transformers")
    got, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("transformers", "plain"))
    assert not stacked or all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_merge_is_the_same(plain: PackedExperts, fragments: PackedExperts) -> None:
    (_, losses), (_, expected) = (merge_adapters(nn.ModuleDict({"experts": e})) for e in (fragments, plain))
    assert losses == expected
    assert layouts(fragments) == [MXLayout.FRAGMENTS] * 2
    assert_same(fragments.state_dict(), plain.state_dict())


def test_dense_weights_of_the_active(plain: PackedExperts, fragments: PackedExperts) -> None:
    for name in PROJECTIONS:
        got, expected = (selective_expert_weights(e, name, torch.tensor([3, 0])) for e in (fragments, plain))
        assert torch.equal(got, expected)


def test_parameters_that_others_put_in_their_place_are_refused(fragments: PackedExperts) -> None:
    cpu_offload(fragments, torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"gate_up_proj_blocks was replaced, .* call arrange\(None\)"):
        step(fragments)


def test_experts_without_data_have_a_checkpoints_layout(fragments: PackedExperts) -> None:
    state = fragments.state_dict()
    fragments.to("meta")
    assert layouts(fragments) == [MXLayout.FWD] * 2
    fragments.load_state_dict(state, assign=True)
    assert layouts(fragments) == [MXLayout.FRAGMENTS] * 2
    assert_same(fragments.state_dict(), state)


def test_parts_are_kept_as_a_checkpoints(plain: PackedExperts, fragments: PackedExperts) -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = ShardedExperts(fragments, init_device_mesh("cpu", (1,)))
        assert layouts(sharded.float()) == [MXLayout.FWD] * 2
        assert torch.equal(step(sharded)[0], step(plain)[0])
        whole = sharded.gathered()
        assert_same(whole.state_dict(), plain.state_dict())
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("tied", ["before", "after"])
def test_parameters_of_two_modules_have_one_layout(tied: str, plain: PackedExperts, fragments: PackedExperts) -> None:
    """Whichever of them is arranged, moved, cast or copied: both give the same numbers."""
    first, second = fragments if tied == "after" else copy.deepcopy(plain), copy.deepcopy(plain)
    for name in PROJECTIONS:
        for part in ("blocks", "scales"):
            setattr(second, f"{name}_{part}", getattr(first, f"{name}_{part}"))
    both, expected = nn.ModuleList([first, second]), step(plain)
    for change in (
        both.float,
        lambda: second.arrange(torch.float16),
        both.float,
        lambda: first.arrange(None),
        lambda: second.arrange(torch.float32),
    ):
        change()
        for module in (first, second, *copy.deepcopy(both)):
            assert all(map(torch.equal, step(module), expected))
            assert_same(module.state_dict(), plain.state_dict())


def test_parameters_are_no_state(plain: PackedExperts, fragments: PackedExperts) -> None:
    """Their bytes lie in another layout than a checkpoint's."""
    other = packed_experts()
    for assign in (False, True):
        with pytest.raises(ValueError, match=r"gate_up_proj_blocks is a parameter of experts .* FRAGMENTS"):
            other.load_state_dict(dict(fragments.named_parameters()), assign=assign)
    assert_same(other.state_dict(), plain.state_dict())


def test_a_state_that_comes_in_parts(plain: PackedExperts, fragments: PackedExperts) -> None:
    """As of several files: codes are there before their scales."""
    fragments.to("meta")
    for name, tensor in plain.state_dict().items():
        fragments.load_state_dict({name: tensor.clone()}, strict=False, assign=True)
    assert layouts(fragments) == [MXLayout.FRAGMENTS] * 2
    assert all(map(torch.equal, step(fragments), step(plain)))


def test_a_state_keeps_its_bytes(plain: PackedExperts, fragments: PackedExperts) -> None:
    fragments.arrange(torch.float16)
    state = fragments.state_dict()
    fragments.float()
    assert layouts(fragments) == [MXLayout.FRAGMENTS] * 2
    assert_same(state, plain.state_dict())


@pytest.mark.usefixtures("fragments")
def test_adapters_are_saved_without_a_copy_of_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT asks for a model's whole state, and keeps the adapters."""
    model: Any = pack_experts(tiny_gpt_oss(), rank=0)
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"], init_lora_weights=False)
    adapted: Any = peft.get_peft_model(model, config)
    whole = adapted.state_dict()
    expected = {name.replace(".default", ""): tensor for name, tensor in whole.items() if "lora_" in name}
    monkeypatch.setattr(MXWeights, "repack", lambda *_: pytest.fail("bytes were brought into another layout"))
    assert_same(peft.get_peft_model_state_dict(adapted), expected)
    adapted.save_pretrained(tmp_path)
    assert_same(load_file(tmp_path / "adapter_model.safetensors"), expected)
    with pytest.raises(pytest.fail.Exception, match="another layout"):
        adapted.state_dict()


def test_experts_that_cannot_be_arranged_leave_the_others(fragments: PackedExperts) -> None:
    replaced = copy.deepcopy(fragments)
    replaced.gate_up_proj_blocks = nn.Parameter(replaced.gate_up_proj_blocks.detach(), requires_grad=False)
    with pytest.raises(RuntimeError, match="was replaced"), checkpoint_layout(nn.ModuleList([fragments, replaced])):
        pass
    assert layouts(fragments) == [MXLayout.FRAGMENTS] * 2


def test_parameters_that_come_back_know_their_layout(plain: PackedExperts, fragments: PackedExperts) -> None:
    """As what offloads them brings them back, past the module."""
    kept = dict(fragments._parameters)
    fragments.to("meta")
    fragments._parameters.update(kept)
    assert all(map(torch.equal, step(fragments), step(plain)))


def test_a_state_of_adapters_alone_leaves_bytes_alone(fragments: PackedExperts) -> None:
    """Between forward and backward, say: bytes that were rearranged and are back again count as changed."""
    packed = [parameter for parameter in fragments.parameters() if parameter.dtype == torch.uint8]
    before = [parameter._version for parameter in packed]
    adapters = {name: tensor for name, tensor in fragments.state_dict().items() if "_lora_" in name}
    fragments.load_state_dict(adapters, strict=False)
    assert [parameter._version for parameter in packed] == before


def test_scales_that_are_given_alone_are_left_alone(plain: PackedExperts, fragments: PackedExperts) -> None:
    state = {"down_proj_scales": plain.down_proj_scales.detach().clone()}
    fragments.load_state_dict(state, strict=False, assign=True)
    assert torch.equal(state["down_proj_scales"], plain.down_proj_scales)
    assert_same(fragments.state_dict(), plain.state_dict())
    fragments.down_proj_scales = nn.Parameter(plain.down_proj_scales.detach(), requires_grad=False)
    with pytest.raises(RuntimeError, match="down_proj_scales was replaced"):
        step(fragments)
