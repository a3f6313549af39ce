"""Where the command runs, and candidates with planted mistakes beside it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

PLANTED = """
from dataclasses import replace
import torch
from mxref import MXWeights, NotCovered, parallel_linear_lora

def correct(**operands):
    return parallel_linear_lora(**operands)
correct.mxref_accumulation = "fp32-blocks-32"

def scale_off_by_one(*, expert_weights, **operands):
    if isinstance(expert_weights, MXWeights):
        scales = expert_weights.scales.clone()
        scales[scales == 121] += 1
        expert_weights = replace(expert_weights, scales=scales)
    return parallel_linear_lora(expert_weights=expert_weights, **operands)

def no_lora(*, lora_A=None, lora_B=None, **operands):
    return parallel_linear_lora(**operands)

def no_gates(*, gates=None, **operands):
    if gates is not None:
        raise NotCovered("gates are not supported")
    return parallel_linear_lora(**operands)

def nothing(**operands):
    raise NotCovered("nothing is supported")

def crash(**operands):
    raise RuntimeError("out of luck")

def noisy(**operands):
    y = parallel_linear_lora(**operands)  # no mean error, or it would be drift
    return y * (1 + 4e-5 * (-1) ** torch.arange(y.shape[1]))
"""


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of our own, and this process's import state put back: the command changes both."""
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "1"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planted.py").write_text(PLANTED)
    return tmp_path
