"""The first training step of a fresh process, every kernel still to be compiled: seconds until it has finished.

What runs in the fresh process is this file: `python -m mxref.verification.bench.first_call DEVICE SHAPE`, the shape as
JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict

import torch

from mxref.verification.bench.pairs import runnable
from mxref.verification.bench.paths import Path, our_paths
from mxref.verification.bench.workloads import MEASURES, Shape, Workload
from mxref.verification.cases.small import usual_dtype


def first_call(shape: Shape, device: torch.device) -> float:
    """Seconds of `first_step` by the automatic way, in a process of its own with an empty Triton cache.

    Raises:
        RuntimeError: the process failed; its last line of error says why.
    """
    command = [sys.executable, "-m", "mxref.verification.bench.first_call", device.type, json.dumps(asdict(shape))]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TRITON_CACHE_DIR": folder}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        *_, reason = ["it said nothing", *done.stderr.splitlines()]
        raise RuntimeError(f"the first call's process failed: {reason}")
    return float(done.stdout)


def first_step(shape: Shape, device: torch.device, path: Path, now: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one training step: forward, dX, dA, dB. Imports, and drawing the operands, come before."""
    workload = Workload.draw(shape, device, usual_dtype(device.type))
    step = runnable(workload, MEASURES[0], path)
    _finish(device)
    begin = now()
    step()
    _finish(device)
    return now() - begin


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _main(device_type: str, shape: str) -> None:
    automatic = next(path for path in our_paths() if path.name == "automatic")
    print(first_step(Shape(**json.loads(shape)), torch.device(device_type), automatic))


if __name__ == "__main__":
    _main(*sys.argv[1:])
