"""Every reachable tiling compiles for every architecture, without a stack and inside the chip's shared memory."""

from __future__ import annotations

import pytest
from uninterpreted import run_python


def test_every_reachable_tiling_compiles() -> None:
    done = run_python("-m", "mxref.verification.studies.compiled.ahead_of_time")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 violations" in done.stdout
    assert all(architecture in done.stdout for architecture in ("sm_80", "sm_90", "sm_100"))


def test_cpu_tensors_without_the_interpreter_are_refused() -> None:
    code = """
import torch, mxref
from mxref import kernels
w = mxref.encode_mxfp4(torch.ones(1, 32, 32))
routing = mxref.flatten_sort_count(torch.zeros(1, 1, dtype=torch.int64), 1)
kernels.parallel_linear_lora(torch.ones(1, 32), w, 1, *routing)
"""
    done = run_python("-c", code)
    assert done.returncode != 0
    if "cuda" in done.stderr:  # pragma: no cover
        pytest.skip("this machine's tensors lie on a GPU")
    assert "set TRITON_INTERPRET=1 before mxref.kernels is imported" in done.stderr
