"""Checkpoints of every convention and family: what was saved has the logits of what is loaded, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import assert_near, tiny_gpt_oss
from safetensors.torch import save_file
from stored import assert_same_tensors, stored
from tiny_models import tiny_model
from transformers import GptOssForCausalLM, Mxfp4Config

from mxref.checkpoints import open_checkpoint
from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.loading import load_packed_model, save_packed_model
from mxref.kernels.models.packing import pack_experts

IDS = torch.arange(7)[None]

DEEPSEEK_NAMES = {
    "model.embed_tokens.weight": "embed.weight",
    "model.hc_head.hc_fn": "hc_head_fn",
    "model.hc_head.hc_base": "hc_head_base",
    "model.hc_head.hc_scale": "hc_head_scale",
}
"""Names in released DeepSeek-V4 checkpoints that transformers does not give back when it saves."""


def as_from(directory: Path, suffixes: dict[str, str], quantization: dict[str, Any]) -> None:
    """Rewrite a checkpoint of ours as another tool would have named it."""

    def renamed(name: str) -> str:
        return next((name.removesuffix(old) + new for old, new in suffixes.items() if name.endswith(old)), name)

    save_file({renamed(name): tensor for name, tensor in stored(directory).items()}, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


@pytest.mark.parametrize(
    ("family", "convention"),
    [
        ("gpt_oss", "gpt-oss"),
        ("granitemoe", "gpt-oss"),
        ("qwen3_moe", "compressed-tensors"),
        ("mixtral", "compressed-tensors"),
        ("minimax_m2", "compressed-tensors"),
        ("glm4_moe", "compressed-tensors"),
        ("kimi_linear", "compressed-tensors"),
        ("deepseek_v4", "DeepSeek-V4"),
        ("qwen3_moe", "gpt-oss"),
    ],
)
def test_saved_and_loaded(family: str, convention: str, tmp_path: Path) -> None:
    model = pack_experts(tiny_model(family), rank=0)
    asked = (family, convention) in (("deepseek_v4", "DeepSeek-V4"), ("qwen3_moe", "gpt-oss"))
    save_packed_model(model, tmp_path, convention=convention if asked else None)
    loaded = load_packed_model(tmp_path, rank=0)
    assert loaded.stored_as.convention == open_checkpoint(tmp_path).convention.name == convention
    assert_same_tensors(loaded.state_dict(), dict(model.state_dict()))
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    save_packed_model(loaded, tmp_path / "again")
    assert_same_tensors(stored(tmp_path / "again"), stored(tmp_path))


@pytest.mark.parametrize("family", ["qwen3_moe", "minimax_m2", "deepseek_v4"])
def test_save_pretrained(family: str, tmp_path: Path) -> None:
    model = pack_experts(tiny_model(family), rank=2, alpha=3.0)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_packed_model(tmp_path, rank=2)(IDS).logits, model(IDS).logits)


def test_a_packed_gpt_oss_is_read_by_transformers(tmp_path: Path) -> None:
    model = pack_experts(tiny_gpt_oss(), rank=0)
    model.save_pretrained(tmp_path)
    dense = GptOssForCausalLM.from_pretrained(
        tmp_path, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    assert_near(model(IDS).logits, dense.float()(IDS).logits)


@pytest.mark.parametrize("tool", ["quark", "modelopt"])
def test_quark_and_modelopt(tool: str, tmp_path: Path) -> None:
    model = pack_experts(tiny_model("qwen3_moe"), rank=0)
    save_packed_model(model, tmp_path)
    as_from(tmp_path, {".weight_packed": ".weight"}, {"quant_method": tool})
    assert torch.equal(load_packed_model(tmp_path, rank=0)(IDS).logits, model(IDS).logits)


def test_torchao(tmp_path: Path) -> None:
    """Written by torchao's own serialisation."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    model = pack_experts(tiny_model("qwen3_moe"), rank=0)
    save_packed_model(model, tmp_path)
    state = {name: tensor for name, tensor in stored(tmp_path).items() if ".experts." not in name}
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            state |= {f"{name}.{p}": module.packed_weights(p).to_torchao() for p in ("gate_up_proj", "down_proj")}
    tensors, metadata = flatten_tensor_state_dict(state)
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    assert torch.equal(load_packed_model(tmp_path, rank=0)(IDS).logits, model(IDS).logits)


def test_deepseek_v4_as_it_is_released(tmp_path: Path) -> None:
    """Its own names, FP8 outside the experts, a layer for which the model has no use; saved under its names."""
    model = pack_experts(tiny_model("deepseek_v4"), rank=0)
    matrix = model.model.layers[0].self_attn.q_a_proj.weight
    codes = matrix.data.mul(4).to(torch.float8_e4m3fn)
    matrix.data = codes.float() / 4
    save_packed_model(model, tmp_path, convention="DeepSeek-V4")
    tensors = {DEEPSEEK_NAMES.get(name, name.removeprefix("model.")): t for name, t in stored(tmp_path).items()}
    tensors |= {name.replace("layers.1", "mtp.0"): t.clone() for name, t in tensors.items() if "layers.1" in name}
    released = {"layers.0.attn.wq_a.weight": codes}
    scales = torch.full((-(-codes.shape[0] // 128), 1), 125, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    released["layers.0.attn.wq_a.scale"] = scales
    save_file({**tensors, **released}, tmp_path / "model.safetensors")
    loaded = load_packed_model(tmp_path, rank=0, dtype=torch.float32)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    save_packed_model(loaded, tmp_path / "again")
    assert stored(tmp_path / "again").keys() == {name for name in tensors if "mtp" not in name}


def test_interleaved_rows_are_not_filled_with_rows_apart(tmp_path: Path) -> None:
    model = pack_experts(tiny_gpt_oss(), rank=0)
    save_packed_model(model, tmp_path)
    tensors = stored(tmp_path)
    for projection, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        name = f"model.layers.0.mlp.experts.{projection}"
        for suffix, new in (("_blocks", "weight_packed"), ("_scales", "weight_scale")):
            for e, stack in enumerate(tensors.pop(name + suffix)):
                rows = stack.flatten(1) if suffix == "_blocks" else stack
                for part, piece in zip(parts, rows.chunk(len(parts)), strict=True):
                    tensors[f"model.layers.0.mlp.experts.{e}.{part}.{new}"] = piece.clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="stores gate and up rows apart, and the module interleaves them"):
        load_packed_model(tmp_path)
