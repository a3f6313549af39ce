"""Every convention that stores MXFP4 experts: read to the stacks that it stands for, and its damages named."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from expert_checkpoints import MAKERS, deepseek_v4, gpt_oss, modelopt, torchao
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mxref import MXWeights
from mxref.checkpoints import (
    CONVENTIONS,
    files,
    list_expert_tensors,
    open_checkpoint,
    read_expert_weights,
    read_other_tensors,
)
from mxref.weights import decode_mxfp4

E0 = "model.layers.0.mlp.experts.0"
K3 = "language_model.model.layers.1.block_sparse_moe.experts"
NVFP4 = {f"{E0}.up_proj.weight_scale": torch.ones(32, 2).to(torch.float8_e4m3fn)}


def changed(directory: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors of a checkpoint; None takes one out."""
    file = directory / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = {**load_file(file), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, metadata=metadata)


@pytest.mark.parametrize("name", MAKERS)
def test_reads_to_the_stacks_that_it_stands_for(name: str, tmp_path: Path) -> None:
    _, expected = MAKERS[name](tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.convention.name == {"Kimi-K3": "compressed-tensors"}.get(name, name)
    assert {(t.name, t.E, t.N, t.K) for t in list_expert_tensors(checkpoint)} == {
        (name, stack.E, stack.N, stack.K) for name, stack in expected.items()
    }
    read = dict(read_expert_weights(checkpoint))
    assert read.keys() == expected.keys()
    for name, stack in expected.items():
        assert torch.equal(read[name].packed, stack.packed), name
        assert torch.equal(read[name].scales, stack.scales), name


def test_every_convention_has_a_maker_and_a_source() -> None:
    assert {convention.name for convention in CONVENTIONS} == MAKERS.keys() - {"Kimi-K3"}
    assert all(convention.source and convention.layout for convention in CONVENTIONS)


def test_the_documented_table_is_the_one_that_is_generated() -> None:
    """And it says what the commands do: the tests of each go over the same conventions."""
    written = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "write_checkpoints.py"))
    page = written["page"]()
    assert written["PAGE"].read_text(encoding="utf-8") == page, "run: python docs/write_checkpoints.py"
    assert all(f"| {convention.name} |" in page for convention in CONVENTIONS)


def test_scales_under_the_name_that_transformers_gives_them(tmp_path: Path) -> None:
    _, expected = deepseek_v4(tmp_path, scale=".weight_scale_inv")
    assert {name for name, _ in read_expert_weights(tmp_path)} == expected.keys()


def test_quantised_matrices_outside_the_experts_are_read_dense(tmp_path: Path) -> None:
    """FP8 blocks of 128 rows: 130 rows of ones under the scales 2 and 1/2; MXFP4 as our own decoder has it."""
    deepseek_v4(tmp_path / "fp8")
    (attention,) = dict(read_other_tensors(tmp_path / "fp8")).values()
    assert attention.dtype == torch.bfloat16
    assert torch.equal(attention, torch.tensor([2.0] * 128 + [0.5] * 2, dtype=torch.bfloat16)[:, None].expand(130, 64))
    tensors, _ = modelopt(tmp_path / "mxfp4")
    name = "model.layers.0.self_attn.q_proj.weight"
    others = dict(read_other_tensors(tmp_path / "mxfp4"))
    assert others.keys() == {name, "model.layers.0.self_attn.conv1d.weight"}
    stored = MXWeights(tensors[name], tensors[f"{name}_scale"], 64, 32)
    assert torch.equal(others[name], decode_mxfp4(stored, torch.bfloat16)[0])


def test_fp8_without_known_scales_is_not_read(tmp_path: Path) -> None:
    deepseek_v4(tmp_path)
    name = "layers.0.attn.wkv"
    changed(tmp_path, {f"{name}.scale": None})
    with pytest.raises(ValueError, match="is F8_E4M3 without scales"):
        list(read_other_tensors(tmp_path))
    changed(tmp_path, {f"{name}.scale": torch.ones(3, 1)})
    with pytest.raises(ValueError, match=r"shape \(130, 64\) and scales \(3, 1\); expected blocks of \[128, 128\]"):
        list(read_other_tensors(tmp_path))


def test_orders_of_rows_and_blocks_that_do_not_fit_a_module(tmp_path: Path) -> None:
    torchao(tmp_path / "torchao")
    assert "blocks run along N" in open_checkpoint(tmp_path / "torchao").cannot_fill(
        SimpleNamespace(is_transposed=True)
    )
    deepseek_v4(tmp_path / "apart")
    apart = open_checkpoint(tmp_path / "apart")
    assert "interleaves" in apart.cannot_fill(SimpleNamespace(is_concatenated=False))
    assert apart.cannot_fill(SimpleNamespace(is_concatenated=True, is_transposed=True)) == ""


def test_an_index_of_shards_and_links_as_in_a_snapshot(tmp_path: Path) -> None:
    """An expert's codes in one shard and its scales in another, both links to files elsewhere."""
    tensors, expected = deepseek_v4(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    weight_map = {name: f"model-{name.endswith('.scale') + 1:05d}-of-00002.safetensors" for name in tensors}
    for shard in set(weight_map.values()):
        held = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        save_file(held, tmp_path / "blobs" / shard)
        (snapshot / shard).symlink_to(tmp_path / "blobs" / shard)
    (snapshot / files.INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    assert {name for name, _ in read_expert_weights(snapshot)} == expected.keys()


def test_a_model_id_is_looked_up_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    revision = "0" * 40
    model = tmp_path / "models--somebody--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(revision)
    _, expected = gpt_oss(model / "snapshots" / revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert {tensor.name for tensor in list_expert_tensors("somebody/tiny")} == expected.keys()
    with pytest.raises(FileNotFoundError, match="run: hf download somebody/else"):
        list_expert_tensors("somebody/else")


@pytest.mark.parametrize("layers", [1, 6])
def test_files_are_opened_a_few_times_a_projection(
    layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the headers, and twice a projection, for codes and scales: not once a tensor, nor once a layer more."""
    from expert_checkpoints import _write, separate, stacks

    expected = stacks([f"model.layers.{layer}.mlp" for layer in range(layers)])
    parts = ("gate_proj", "up_proj", "down_proj")
    suffixes = (".weight_packed", ".weight_scale")
    _write(tmp_path, separate(expected, str, parts, lambda *pair: dict(zip(suffixes, pair, strict=True))), {})
    opened = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal opened
        opened += 1
        return safe_open(*arguments, **options)

    monkeypatch.setattr(files, "safe_open", counted)
    assert len(list(read_expert_weights(tmp_path))) == 2 * layers
    assert opened == 1 + 2 * 2 * layers


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "DeepSeek-V4",
            {"layers.0.ffn.experts.1.w3.weight": None},
            r"layers\.0\.ffn\.experts\.1\.w3\.weight is missing",
        ),
        (
            "DeepSeek-V4",
            {f"layers.0.ffn.experts.2.{w}.{s}": None for w in ("w1", "w2", "w3") for s in ("weight", "scale")},
            r"layers\.0\.ffn\.experts\.2\.w1\.weight is missing in .*, which has 3 experts a layer",
        ),
        ("DeepSeek-V4", {"layers.0.ffn.experts.1.w3.scale": None}, r"w3\.weight in .* has no partner .*w3\.scale or"),
        ("DeepSeek-V4", {"layers.0.ffn.experts.0.w2.weight": torch.zeros(64, 16)}, "dtype F32; expected I8"),
        (
            "DeepSeek-V4",
            {"layers.0.ffn.experts.0.w2.weight": torch.zeros(64, 16).to(torch.float8_e4m3fn)},
            "dtype F8_E4M3; expected I8",
        ),
        ("DeepSeek-V4", {"layers.0.ffn.experts.0.w2.scale": torch.zeros(64, 1)}, "dtype F32; expected F8_E8M0"),
        ("DeepSeek-V4", {"layers.0.ffn.experts.0.w2.weight": torch.zeros(64, 32, dtype=torch.int8)}, "has shape"),
        ("compressed-tensors", NVFP4, "dtype F8_E4M3; expected U8"),
        ("compressed-tensors", {f"{E0}.up_proj.weight_packed": torch.zeros(32, 8, dtype=torch.int32)}, "dtype I32"),
        ("compressed-tensors", {f"{E0}.up_proj.weight_scale": None}, "has no partner"),
        ("Kimi-K3", {f"{K3}.2.w2.weight_packed": None}, r"experts\.2\.w2\.weight is missing"),
        ("Quark", {f"{E0}.up_proj.weight_scale": torch.zeros(32, 2)}, "dtype F32; expected U8"),
        ("Quark", {f"{E0}.up_proj.weight": torch.zeros(32, 48, dtype=torch.uint8)}, r"has shape \(32, 48\)"),  # MXFP6
        ("ModelOpt", {f"{E0}.up_proj.weight": None}, r"up_proj\.weight is missing"),
        ("torchao", {"model.layers.0.mlp.experts._down_proj_scale": None}, "has no partner"),
    ],
)
def test_damages_are_named(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    MAKERS[name](tmp_path)
    changed(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("count", [4, 10**12])
def test_an_expert_that_every_layer_lacks(count: int, tmp_path: Path) -> None:
    """Only the configuration knows of it."""
    MAKERS["Kimi-K3"](tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"num_experts": count}}))
    with pytest.raises(
        ValueError, match=rf"experts\.3\.w1\.weight is missing in .*, which has {count} experts a layer"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_swizzled_scales": True}, "its scales swizzled; expected"),
        ({"block_size": 16}, "in blocks of 16"),
        ({"elem_dtype": {"_data": "float8_e4m3fn"}}, "of float8_e4m3fn"),
        (None, "has no description as a torchao MXTensor"),
    ],
)
def test_what_torchao_says_about_a_tensor_counts(change: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    tensors, _ = torchao(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
    name = "model.layers.0.mlp.experts.down_proj"
    described = json.loads(metadata[name])
    described["_data"].update(change or {})
    metadata[name] = "[" * 10_000 if change is None else json.dumps(described)
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (
            {"x.experts.0.w1.weight": torch.zeros(2, 2, dtype=torch.bfloat16)},
            {},
            "1 BF16, such as .*, which are not quant",
        ),
        (
            {"x.qweight": torch.zeros(2, 2, dtype=torch.int32)},
            {"quant_method": "gptq"},
            "quantised, gptq; known are gpt-oss",
        ),
        ({"x.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, {}, r"1 F8_E4M3, such as x\.weight\); known are"),
    ],
)
def test_anything_else_is_refused_with_what_it_is(
    tensors: dict[str, torch.Tensor], config: dict[str, str], message: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
    with pytest.raises(ValueError, match=message) as refused:
        open_checkpoint(tmp_path)
    assert ("pack_experts" in str(refused.value)) == ("BF16" in str(refused.value))
