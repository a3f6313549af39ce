"""The fast interpreter gives what Triton's own gives, bit by bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def mixed(out_ptr, x_ptr, wide_ptr, n, M: tl.constexpr, N: tl.constexpr):
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    at = rows[:, None] * N + columns[None, :]
    x = tl.load(x_ptr + at, mask=(rows < n)[:, None] & (columns >= 0)[None, :], other=0.0)
    wide = tl.load(wide_ptr + rows)  # int64 beside int32, and a scalar of either
    far = (wide + rows)[:, None] * 2 + n * wide[:, None] + at
    zeros = (x * 0.0 + -0.0) + (x * -0.0 + 0.0)  # of two signs, which are one number to Python
    sums = tl.where((columns < 3)[None, :], x, -x) + rows.to(tl.float32)[:, None] + columns[None, :]
    bits = (x * 0.0).to(tl.int32, bitcast=True) ^ (x * -0.0).to(tl.int32, bitcast=True)
    signed = (zeros.to(tl.int32, bitcast=True) >> 31) + bits + (2 * n - 3)
    for step in range(2):  # what is remembered of the first must hold for the second
        tl.store(out_ptr + step * 4 * M * N + at, sums + step)
        tl.store(out_ptr + (step * 4 + 1) * M * N + at, far.to(tl.float32) / 3)
        tl.store(out_ptr + (step * 4 + 2) * M * N + at, signed.to(tl.float32) * (1 - step))
        tl.store(out_ptr + (step * 4 + 3) * M * N + at, 1.0 / (x * (0.0 - 0.0 * step)))
        x = -x


if sys.argv[1] == "fast":
    from mxref.verification.candidates.own.interpret_only import interpret_only

    interpret_only()
x = torch.linspace(-2, 2, 32).reshape(4, 8)
out = torch.empty(8, 4, 8)
for wide in (torch.arange(4) * 2**33, torch.arange(4).int()):
    for n in (3, 2**33 + 1):
        mixed[(1,)](out, x, wide, n, 4, 8)
        print(out.numpy().tobytes().hex())
"""


def test_it_gives_the_bits_of_the_interpreter(tmp_path: Path) -> None:
    """Mixed integers and floats, scalars and blocks, pointers, zeros of either sign."""
    script = tmp_path / "mixed.py"
    script.write_text(_SCRIPT)

    def run(how: str) -> str:
        command = [sys.executable, str(script), how]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300).stdout

    plain = run("plain")
    assert len(set(plain.split())) == 4
    assert run("fast") == plain
