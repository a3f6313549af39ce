"""How a kernel starts: on a GPU, in Triton's interpreter on CPU tensors, or recorded for ahead-of-time compilation.

Every launch of this package passes through `launch`, so the recorder sees exactly what would run. Host code never
reads a device tensor's value: recorded with tensors on the `meta` device it would raise at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

__all__ = ["INTERPRETED", "Launch", "Recorder", "aligned", "architecture", "compute_dtype", "launch", "recording"]

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET was set when this package was imported; `@triton.jit` decides at the same moment."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the jitted function, its arguments by name, and its compile options."""

    kernel: Any
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass
class Recorder:
    """Collects launches instead of running them, as if on a GPU of `architecture`, such as "sm_90"."""

    architecture: str
    launches: list[Launch] = field(default_factory=list)


_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def recording(architecture: str) -> Iterator[Recorder]:
    """Within this context launches are recorded and not run; give every operand on the `meta` device."""
    token = _recorder.set(recorder := Recorder(architecture))
    try:
        yield recorder
    finally:
        _recorder.reset(token)


def architecture(device: torch.device) -> str:
    """The key of the configuration table for `device`: "interpreter", or "sm_80", "sm_90", "sm_100" by generation.

    Raises:
        RuntimeError: no kernel can run on `device`.
    """
    recorder = _recorder.get()
    if recorder is not None:
        return recorder.architecture
    if INTERPRETED:
        return "interpreter"
    if device.type != "cuda":
        raise RuntimeError(
            f"the operands lie on {device}, where Triton kernels cannot run; move them to a CUDA GPU, or set "
            "TRITON_INTERPRET=1 before mxref.kernels is imported to interpret the kernels on CPU tensors"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise RuntimeError(f"{device} has compute capability {capability}; bf16 products need at least (8, 0)")
    return "sm_80" if capability < (9, 0) else "sm_90" if capability < (10, 0) else "sm_100"


def compute_dtype(activation: torch.dtype) -> torch.dtype:
    """What operands and buffers hold in memory: the activation dtype, or fp32 under the interpreter.

    The interpreter's bf16 arithmetic is wrong (it truncates and flushes subnormals), so there every operand is
    upcast, every buffer is fp32, and no rounding point applies.
    """
    return torch.float32 if INTERPRETED else activation


def aligned(x: Tensor) -> Tensor:
    """A tensor whose first element lies at a multiple of 16 bytes, as wide copies need it: itself, or else a copy."""
    return x if x.is_meta or x.data_ptr() % 16 == 0 else x.clone()


def launch(kernel: Any, programs: int, num_warps: int, num_stages: int, **arguments: Any) -> None:
    """Start `programs` instances of `kernel`, or record the launch; nothing happens when there are none.

    FP fusion is off, so that each written product and sum rounds once on its own. The interpreter computes with
    NumPy, whose warnings about IEEE's infinities and NaNs are silenced: they are results here.
    """
    if programs == 0:
        return
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launches.append(Launch(kernel, arguments, num_warps, num_stages))
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    scope = torch.cuda.device(device) if device.type == "cuda" else np.errstate(over="ignore", invalid="ignore")
    with scope:
        kernel[(programs,)](**arguments, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=False)
