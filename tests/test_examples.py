"""The scripts in examples/ run as they are, without a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mxref.verification.cli import main

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *arguments: str | Path) -> str:
    """What a script prints."""
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_run_here() -> None:
    tested = {"judge_my_kernel.py", "judge_my_step.py", "pack_checkpoint.py", "finetune_gpt_oss.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_judge_my_kernel(tmp_path: Path) -> None:
    out = run("judge_my_kernel.py", "--out", tmp_path)
    assert "gates=none" in out
    assert "PASS" in out
    assert (tmp_path / "gate.html").is_file()


def test_judge_my_step(tmp_path: Path) -> None:
    out = run("judge_my_step.py", "--out", tmp_path)
    assert "PASS" in out
    assert (tmp_path / "gate.html").is_file()


def test_pack_checkpoint_and_inspect_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
    GptOssForCausalLM(GptOssConfig(**sizes, **heads)).save_pretrained(tmp_path / "dense")
    out = run("pack_checkpoint.py", tmp_path / "dense", tmp_path / "packed")
    before, after = (int(number.replace(",", "")) for number in re.findall(r"[\d,]+\d", out)[:2])
    assert after / before == pytest.approx(17 / 32 / 4)  # from fp32
    assert main(["inspect", str(tmp_path / "packed")]) == 0
    assert "2 projections" in capsys.readouterr().out


def test_finetune_gpt_oss() -> None:
    out = run("finetune_gpt_oss.py")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) == 8
    assert losses[-1] < 0.5 * losses[0]
    assert "adapter_model.safetensors" in out
