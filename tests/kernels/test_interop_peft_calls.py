"""The calls that people use on a packed model do what they do on a dense one, or refuse before anything trains."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import dequantise, small_model
from moe_models import EXPERTS, HIDDEN, assert_near, make
from torch import Tensor, nn

from mxref.kernels.models.adapter_files import load_adapters, save_adapters
from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.packing import pack_experts

FAMILIES = ("gpt_oss", "qwen3_moe", "mixtral", "deepseek_v3")
PROJECTIONS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.arange(5)[None]


def packed_and_dense(family: str = "qwen3_moe") -> tuple[Any, Any]:
    """The same model twice: packed, and with the dequantised weights."""
    dense = small_model(family)
    packed = pack_experts(copy.deepcopy(dense), rank=0)
    return packed, dequantise(dense, packed)


def lora(**options: Any) -> peft.LoraConfig:
    """For attention and experts."""
    given = {"r": 2, "lora_alpha": 3, "target_modules": ["o_proj"], "target_parameters": PROJECTIONS, **options}
    return peft.LoraConfig(**{"init_lora_weights": False, "task_type": "CAUSAL_LM", **given})


def logits(model: Any) -> Tensor:
    out: Tensor = model(IDS, use_cache=False).logits.detach()
    return out


def injected(wrap: Callable[[Any, peft.LoraConfig], Any], model: Any, **options: Any) -> Any:
    torch.manual_seed(7)
    return wrap(model, lora(**options)) or model


CALLS: dict[str, Callable[[Any, peft.LoraConfig], Any]] = {
    "get_peft_model": peft.get_peft_model,
    "get_peft_model, mixed": lambda model, config: peft.get_peft_model(model, config, mixed=True),
    "inject_adapter_in_model": lambda model, config: peft.inject_adapter_in_model(config, model),
    "add_adapter": lambda model, config: model.add_adapter(config),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_made_by(family: str, call: str) -> None:
    packed, dense = packed_and_dense(family)
    base = logits(dense)
    ours, theirs = injected(CALLS[call], packed), injected(peft.get_peft_model, dense)
    assert_near(logits(ours), logits(theirs))
    assert float((logits(ours) - base).abs().max()) > 1e-3
    assert sum(p.requires_grad for p in ours.parameters()) == sum(p.requires_grad for p in theirs.parameters())
    assert {p.device.type for p in ours.parameters()} == {"cpu"}


def _into_adapter_beside(model: Any, directory: Path) -> Any:
    adapted: Any = peft.get_peft_model(model, lora(r=1))
    adapted.load_adapter(directory, "loaded")
    adapted.set_adapter("loaded")
    return adapted


READERS: dict[str, Callable[[Any, Path], Any]] = {
    "from_pretrained": peft.PeftModel.from_pretrained,
    "from_pretrained, low memory": lambda m, d: peft.PeftModel.from_pretrained(m, d, low_cpu_mem_usage=True),
    "PeftModel.load_adapter": _into_adapter_beside,
    "model.load_adapter": lambda m, d: m.load_adapter(str(d)) and m,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_plain_peft_read_by(family: str, reader: str, tmp_path: Path) -> None:
    packed, dense = packed_and_dense(family)
    bytes_before = {name: p.clone() for name, p in packed.named_parameters() if p.dtype == torch.uint8}
    theirs = injected(peft.get_peft_model, dense)
    theirs.save_pretrained(tmp_path)
    ours = READERS[reader](packed, tmp_path)
    assert_near(logits(ours), logits(theirs))
    after = {name: p for name, p in ours.named_parameters() if p.dtype == torch.uint8}
    assert len(after) == len(bytes_before) > 0
    assert all(torch.equal(*pair) for pair in zip(after.values(), bytes_before.values(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_made_here_are_read_by_plain_peft(family: str, tmp_path: Path) -> None:
    packed, dense = packed_and_dense(family)
    ours = injected(CALLS["add_adapter"], packed)
    ours.save_pretrained(tmp_path)
    assert_near(logits(peft.PeftModel.from_pretrained(dense, tmp_path)), logits(ours))


def test_another_method_beside_lora() -> None:
    outcomes = []
    for model in packed_and_dense():
        adapted = injected(CALLS["get_peft_model, mixed"], model)
        adapted.add_adapter("loha", peft.LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False))
        adapted.set_adapter(["default", "loha"])
        outcomes.append(logits(adapted))
    assert_near(*outcomes)
    with pytest.raises(ValueError, match="cannot be merged"):
        injected(CALLS["get_peft_model, mixed"], packed_and_dense()[0]).merge_and_unload()


def test_a_second_adapter_without_experts() -> None:
    models = []
    for model in packed_and_dense():
        adapted = injected(peft.get_peft_model, model)
        adapted.add_adapter("attention", lora(target_parameters=None, lora_alpha=5))
        models.append(adapted)
    ours, theirs = models
    outcomes = []
    for active in ("attention", "default", ["default", "attention"]):
        for model in models:
            model.base_model.set_adapter(active)
        outcomes.append(logits(ours))
        assert_near(outcomes[-1], logits(theirs))
    assert float((outcomes[0] - outcomes[2]).abs().max()) > 1e-3


def test_attention_alone_is_no_business_of_the_experts() -> None:
    packed, dense = packed_and_dense()
    ours, theirs = (injected(peft.get_peft_model, m, target_parameters=None) for m in (packed, dense))
    assert_near(logits(ours), logits(theirs))
    merged = ours.merge_and_unload()
    assert_near(logits(merged), logits(theirs))


def test_names_from_before_the_experts_were_stacked() -> None:
    """PEFT brings them up to date, `w1` to `gate_up_proj`, and finds the packed projections."""
    models = [injected(peft.get_peft_model, m, target_modules=["q_proj", "w1", "w2", "w3"], target_parameters=None)
              for m in packed_and_dense("mixtral")]  # fmt: skip
    assert_near(logits(models[0]), logits(models[1]))
    assert any("experts" in name for name, p in models[0].named_parameters() if p.requires_grad)


BEFORE_WRAPPING: list[tuple[dict[str, Any], str]] = [
    (
        {"target_parameters": ["mlp.experts.gate_up_prj"]},
        r"'mlp\.experts\.gate_up_prj'.*nearest.*experts\.gate_up_proj",
    ),
    ({"target_parameters": ["experts.up_proj"]}, r"nearest names are \['experts\.gate_up_proj'"),
    ({"target_parameters": ["mlp.experts.down_prj"]}, r"are \['mlp\.experts\.down_proj', .*gate_up_proj'\]$"),
    ({"target_modules": ["q_proj", "gate_up_proj"], "target_parameters": None}, r"'gate_up_proj'.*target_parameters"),
    ({"r": 129}, r"experts\.gate_up_proj: rank is 129; the kernels take ranks 1 to 128"),
    ({"rank_pattern": {"down_proj": 200}}, r"down_proj: rank is 200"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
]
WHILE_PEFT_WRAPS: list[tuple[dict[str, Any], str]] = [
    ({"target_parameters": ["mlp.experts.down_proj_blocks"]}, "asked for down_proj_blocks of PackedExperts"),
    ({"target_modules": ["experts"], "target_parameters": None}, "asked for the whole module"),
    ({"lora_dropout": 0.1}, "lora_dropout"),
    ({"use_dora": True}, "use_dora"),
    ({"lora_bias": True}, "lora_bias"),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("options", "message"), BEFORE_WRAPPING + WHILE_PEFT_WRAPS)
def test_what_every_call_refuses(call: str, options: dict[str, Any], message: str) -> None:
    packed = pack_experts(small_model("gpt_oss"), rank=0)
    before = [name for name, _ in packed.named_parameters()]
    with pytest.raises(ValueError, match=message):
        CALLS[call](packed, lora(**options))
    names = [name for name, _ in packed.named_parameters()]
    assert not any(name.endswith(tuple(PROJECTIONS)) for name in names)
    if (options, message) in BEFORE_WRAPPING:
        assert names == before


def test_own_adapters_are_not_frozen_behind_ones_back() -> None:
    model = pack_experts(small_model("qwen3_moe"), rank=2)
    with pytest.raises(ValueError, match="owns adapters already"):
        peft.get_peft_model(model, lora(target_parameters=None))
    assert sum(p.requires_grad for p in model.parameters()) == 4 * len(experts_of(model))


FRESH = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
import peft
config = peft.LoraConfig(target_modules=[], target_parameters=["experts.down_proj"])
adapted = peft.get_peft_model(model, config)
print([name for name, p in adapted.named_parameters() if p.requires_grad])
"""


def test_a_pickle_in_a_fresh_process(tmp_path: Path) -> None:
    """What was packed elsewhere is known to PEFT as soon as it is read."""
    torch.save(pack_experts(nn.ModuleDict({"experts": make("qwen3_experts")}), rank=0), tmp_path / "model.pt")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "model.pt")],
        cwd=tmp_path, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("experts.lora_") == 2


def test_adapted_experts_are_pickled_and_copied() -> None:
    holder = pack_experts(nn.ModuleDict({"experts": make("qwen3_experts")}), rank=0)
    config = lora(target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"], task_type=None)
    adapted: Any = peft.get_peft_model(holder, config)
    call = (torch.randn(3, HIDDEN), torch.randint(EXPERTS, (3, 2)), torch.rand(3, 2))
    expected = adapted.base_model.model["experts"](*call)
    stream = io.BytesIO()
    torch.save(adapted, stream)
    stream.seek(0)
    for again in (torch.load(stream, weights_only=False), copy.deepcopy(adapted)):
        assert torch.equal(again.base_model.model["experts"](*call), expected)


def test_other_models_are_as_pefts_own() -> None:
    """Without packed experts in it a model gets PEFT's wrappers, and merges."""
    model = small_model("qwen3_moe")
    expected = logits(model)
    adapted = injected(peft.get_peft_model, model)
    wrappers = {type(m) for m in adapted.modules() if type(m).__name__ == "ParamWrapper"}
    assert wrappers == {peft.tuners.lora.layer.ParamWrapper}
    different = logits(adapted)
    assert float((different - expected).abs().max()) > 1e-3
    assert_near(logits(adapted.merge_and_unload()), different)


def experts_of(model: nn.Module) -> list[PackedExperts]:
    return [module for module in model.modules() if isinstance(module, PackedExperts)]


def with_own_adapters(family: str, rank: int = 3, alpha: float = 4.5) -> tuple[Any, Any]:
    dense = small_model(family)
    packed = pack_experts(copy.deepcopy(dense), rank=rank, alpha=alpha)
    for name, parameter in packed.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    return packed, dequantise(dense, packed)


@pytest.mark.parametrize("family", FAMILIES)
def test_own_adapters_saved_and_read(family: str, tmp_path: Path) -> None:
    packed, dense = with_own_adapters(family)
    save_adapters(packed, tmp_path)
    assert_near(logits(peft.PeftModel.from_pretrained(copy.deepcopy(dense), tmp_path)), logits(packed))
    beside = peft.PeftModel.from_pretrained(pack_experts(copy.deepcopy(dense), rank=0), tmp_path)
    assert_near(logits(beside), logits(packed))
    again = pack_experts(copy.deepcopy(dense), rank=1)
    load_adapters(again, tmp_path)
    assert torch.equal(logits(again), logits(packed))
    assert list(again.state_dict()) == list(packed.state_dict())
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in packed.parameters()]


def test_what_own_adapters_cannot_be(tmp_path: Path) -> None:
    packed, dense = with_own_adapters("qwen3_moe")
    with pytest.raises(ValueError, match="none; expected one for all"):
        save_adapters(pack_experts(small_model("qwen3_moe"), rank=0), tmp_path)
    experts_of(packed)[0].remove_lora()
    experts_of(packed)[0].add_lora(5)
    with pytest.raises(ValueError, match=r"\[\(3, 4\.5\), \(5, 5\.0\)\]"):
        save_adapters(packed, tmp_path)
    before = logits(packed)
    for options, message in (
        ({}, r"adapts model\.layers\.0\.self_attn\.o_proj too"),
        ({"target_modules": [], "target_parameters": PROJECTIONS[:1]}, "different adapters"),
        ({"target_modules": [], "rank_pattern": {"down_proj": 3}}, "different adapters"),
        ({"target_parameters": None}, "reaches no packed experts"),
    ):
        injected(peft.get_peft_model, copy.deepcopy(dense), **options).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            load_adapters(packed, tmp_path)
        assert torch.equal(logits(packed), before)
