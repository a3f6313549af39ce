"""`mxref inspect`, and the DeepSeek-V4 reader that it shares with the kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mxref import MXWeights, encode_mxfp4
from mxref.checkpoints.deepseek_v4 import (
    is_deepseek_checkpoint,
    list_deepseek_expert_tensors,
    read_deepseek_expert_weights,
)
from mxref.checkpoints.gpt_oss import write_expert_weights
from mxref.checkpoints.statistics import BlockStatistics, inspect_checkpoint
from mxref.verification.cli import main

NAME = "model.layers.0.mlp.experts.down_proj"


def known_blocks() -> MXWeights:
    """Four blocks: zeros (with a negative one), a six, NaN, and plain ones."""
    packed = torch.full((1, 4, 16), 0x22, dtype=torch.uint8)
    packed[0, 0] = 0x80
    packed[0, 1, 3] = 0xF2
    scales = torch.tensor([[[127], [120], [255], [127]]], dtype=torch.uint8)
    return MXWeights(packed, scales, 32, 4)


def test_counts() -> None:
    found = BlockStatistics.of("w", known_blocks())
    assert (found.blocks, found.zero, found.saturated, found.nan) == (4, 1, 1, 1)
    assert {byte: n for byte, n in enumerate(found.scale_bytes) if n} == {120: 1, 127: 2, 255: 1}
    assert found.byte_range == (120, 255)


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_expert_weights(tmp_path / "m.safetensors", {NAME: known_blocks()})
    assert main(["inspect", str(tmp_path / "m.safetensors")]) == 0
    out = capsys.readouterr().out
    assert NAME in out
    assert "1 × 4 × 32" in out
    assert "120–255" in out
    assert out.count("25.00 %") == 3
    assert "1 NaN" in out


@pytest.mark.parametrize("content", [None, b"", b"not safetensors"])
def test_errors_take_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None) -> None:
    file = tmp_path / "m.safetensors"
    if content is not None:
        file.write_bytes(content)
    assert main(["inspect", str(file)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mxref: error: ")
    assert err.count("\n") == 1


def deepseek_tensors(experts: int = 3, scale_name: str = "scale") -> tuple[dict[str, Tensor], dict[str, MXWeights]]:
    """One layer as a DeepSeek-V4 checkpoint stores it, and the stacks it should become."""
    w13 = encode_mxfp4(torch.randn(experts, 32, 64, generator=torch.Generator().manual_seed(0)))
    w2 = encode_mxfp4(torch.randn(experts, 64, 32, generator=torch.Generator().manual_seed(1)))
    tensors = {"embed.weight": torch.zeros(2, 2)}
    for e in range(experts):
        rows = {"w1": (w13, slice(0, 16)), "w3": (w13, slice(16, 32)), "w2": (w2, slice(0, 64))}
        for part, (stack, own) in rows.items():
            stem = f"layers.0.ffn.experts.{e}.{part}"
            tensors[f"{stem}.weight"] = stack.packed[e, own].view(torch.int8).clone()
            tensors[f"{stem}.{scale_name}"] = stack.scales[e, own].view(torch.float8_e8m0fnu).clone()
    prefix = "model.layers.0.mlp.experts"
    return tensors, {f"{prefix}.gate_up_proj": w13, f"{prefix}.down_proj": w2}


@pytest.mark.parametrize("scale_name", ["scale", "weight_scale_inv"])
def test_deepseek_layout(tmp_path: Path, scale_name: str) -> None:
    tensors, expected = deepseek_tensors(scale_name=scale_name)
    save_file(tensors, tmp_path / "m.safetensors")
    assert is_deepseek_checkpoint(tmp_path)
    assert [(t.name, t.E, t.N, t.K) for t in list_deepseek_expert_tensors(tmp_path)] == [
        (name, w.E, w.N, w.K) for name, w in expected.items()
    ]
    for name, weights in read_deepseek_expert_weights(tmp_path):
        assert torch.equal(weights.packed, expected[name].packed)
        assert torch.equal(weights.scales, expected[name].scales)
    layout, count, statistics = inspect_checkpoint(tmp_path)
    assert (layout, count, len(list(statistics))) == ("DeepSeek-V4", 2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.0.ffn.experts.1.w3.weight": None}, r"experts\.1\.w3\.weight is missing"),
        ({"layers.0.ffn.experts.1.w3.scale": None}, "has no scales"),
        ({"layers.0.ffn.experts.0.w2.weight": torch.zeros(64, 16)}, "dtype F32; expected I8"),
        ({"layers.0.ffn.experts.0.w2.scale": torch.zeros(64, 1)}, "dtype F32; expected F8_E8M0"),
        ({"layers.0.ffn.experts.0.w2.weight": torch.zeros(64, 32, dtype=torch.int8)}, "has shape"),
    ],
)
def test_broken_deepseek_checkpoints(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    tensors, _ = deepseek_tensors()
    changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
    save_file(changed, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=message):
        list_deepseek_expert_tensors(tmp_path)
