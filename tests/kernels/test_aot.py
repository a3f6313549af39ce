"""Every reachable launch compiles for every architecture, without a stack and inside the chip's shared memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that is free to compile: TRITON_INTERPRET is decided at import."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


def test_every_reachable_launch_compiles() -> None:
    done = run_python("-m", "mxref.kernels.aot")
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


def test_widths_that_sixteen_does_not_divide_take_the_portable_kernel_on_hopper() -> None:
    """Rows of dY are copied in 16 bytes there."""
    code = """
import torch
from mxref import MXWeights
from mxref.kernels import aot, parallel_linear_lora
from mxref.kernels.launch import recording

E, K, N, M = 2, 64, 162, 8
codes, scales = (torch.empty(E, N, K // d, dtype=torch.uint8, device="meta") for d in (2, 32))
x = torch.empty(M, K, dtype=torch.bfloat16, device="meta", requires_grad=True)
ids = torch.empty(M, dtype=torch.int64, device="meta")
with recording("sm_90") as recorder:
    y = parallel_linear_lora(x, MXWeights(codes, scales, K, N), 1, ids, ids, ids[:E])
    y.backward(torch.empty_like(y))
for launch in recorder.launches:
    aot.compile_unit(aot.Unit.of("sm_90", "odd N", launch))
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
