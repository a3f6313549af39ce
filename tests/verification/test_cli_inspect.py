"""`mxref inspect`: what it counts, what it prints, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from expert_checkpoints import MAKERS

from mxref import MXWeights
from mxref.checkpoints import write_expert_weights
from mxref.checkpoints.statistics import BlockStatistics
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


@pytest.mark.parametrize("convention", MAKERS)
def test_every_convention(tmp_path: Path, capsys: pytest.CaptureFixture[str], convention: str) -> None:
    _, stacks = MAKERS[convention](tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for name in stacks:
        assert name in out
    assert f"{'compressed-tensors' if convention == 'Kimi-K3' else convention} names · {len(stacks)} projections" in out


@pytest.mark.parametrize("argument", ["somebody/nothing", "../nothing"])
def test_what_is_not_there(capsys: pytest.CaptureFixture[str], argument: str) -> None:
    assert main(["inspect", argument]) == 2
    err = capsys.readouterr().err
    assert f"no checkpoint at {argument}" in err
    assert ("hf download" in err) == (argument == "somebody/nothing")
