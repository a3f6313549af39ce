"""How a kernel starts: on a GPU, in Triton's interpreter on CPU tensors, or recorded for ahead-of-time compilation.

Every launch of this package is a `PreparedLaunch`, so the recorder sees exactly what would run. Host code never reads a
device tensor's value: recorded with tensors on the `meta` device it would raise at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from torch._subclasses import FakeTensor

__all__ = [
    "INTERPRETED",
    "Launch",
    "PreparedLaunch",
    "Recorder",
    "aligned",
    "architecture",
    "compute_dtype",
    "generation",
    "passed_on",
    "recording",
]

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET was set when this package was imported; `@triton.jit` decides at the same moment."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the jitted function, and its arguments and compile options by name."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


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
    return "interpreter" if INTERPRETED else _generation(device)


@cache
def _generation(device: torch.device) -> str:
    if device.type != "cuda":
        raise RuntimeError(
            f"the operands lie on {device}, where Triton kernels cannot run; move them to a CUDA GPU, or set "
            "TRITON_INTERPRET=1 before mxref.kernels is imported to interpret the kernels on CPU tensors"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise RuntimeError(f"{device} has compute capability {major, minor}; bf16 products need at least (8, 0)")
    return generation(10 * major + minor)


def generation(capability: int) -> str:
    """The key of the configuration table for a compute capability of 80 or more, such as 89."""
    return "sm_80" if capability < 90 else "sm_90" if capability < 100 else "sm_100"


def passed_on(x: Tensor) -> bool:
    """Whether a call with `x` goes to PyTorch as an operator: where it is traced, or only shapes are asked for."""
    return torch.compiler.is_compiling() or ((x.is_meta or isinstance(x, FakeTensor)) and _recorder.get() is None)


def compute_dtype(activation: torch.dtype) -> torch.dtype:
    """What operands and buffers hold in memory: the activation dtype, or fp32 under the interpreter.

    The interpreter's bf16 arithmetic is wrong (it truncates and flushes subnormals), so there every operand is
    upcast, every buffer is fp32, and no rounding point applies.
    """
    return torch.float32 if INTERPRETED else activation


def aligned(x: Tensor) -> Tensor:
    """A tensor whose first element lies at a multiple of 16 bytes, as wide copies need it: itself, or else a copy."""
    return x if x.is_meta or x.data_ptr() % 16 == 0 else x.clone()


class PreparedLaunch:
    """A launch of which everything but the tensors is known; calling it with them starts the kernel.

    On a GPU the first call goes through Triton, which specialises the kernel and compiles it. Later ones start what it
    made at once, as long as Triton would take the same: on one device, the same tensors missing, the same dtypes, and
    the same addresses multiples of 16. That saves most of the host's time. FP fusion is off, so that each written
    product and sum rounds once on its own.

    Args:
        kernel: the jitted function.
        programs: how many instances of it start; nothing happens when there are none.
        num_warps, num_stages: compile options.
        max_registers: how many a thread may have at most; None leaves it to the compiler.
        known: the arguments that are no tensors, by name: the last of the kernel's.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        num_warps: int,
        num_stages: int,
        max_registers: int | None = None,
        **known: Any,
    ) -> None:
        self._kernel, self._programs = kernel, programs
        self._options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}
        if max_registers is not None:
            self._options["maxnreg"] = max_registers
        self._tensors = tuple(name for name in kernel.arg_names if name not in known)
        self._known = tuple(known[name] for name in kernel.arg_names[len(self._tensors) :])
        self._compiled: dict[Any, Any] = {}

    def __call__(self, **tensors: Any) -> None:
        """Start, interpret or record it, with the tensors by name; those that are left out are None.

        Raises:
            TypeError: the kernel takes no tensor of this name.
        """
        if not self._programs:
            return
        given = [tensors.pop(name, None) for name in self._tensors]
        if tensors:
            raise TypeError(f"got {', '.join(tensors)}; {self._kernel.__name__} takes {', '.join(self._tensors)}")
        recorder = _recorder.get()
        if recorder is not None:
            arguments = dict(zip(self._kernel.arg_names, (*given, *self._known), strict=True))
            recorder.launches.append(Launch(self._kernel, arguments, self._options))
        elif INTERPRETED:
            with np.errstate(over="ignore", invalid="ignore"):  # IEEE's infinities and NaNs are results here
                self._through_triton(given)
        else:
            self._start(given)

    def _through_triton(self, given: list[Any]) -> Any:
        """Start it as Triton does; the compiled kernel, or None where it is interpreted."""
        return self._kernel[(self._programs,)](*given, *self._known, **self._options)

    def _start(self, given: list[Any]) -> None:
        """Start it on the first tensor's GPU."""
        driver, device = triton.runtime.driver.active, given[0].device
        if driver.get_current_device() != device.index:
            with torch.cuda.device(device):
                return self._start(given)
        arguments, kind, bits = list[Any](), [device.index], 0
        for value in given:
            if isinstance(value, Tensor):
                address = value.data_ptr()
                arguments.append(address)
                kind.append(value.dtype)
                bits |= address
            else:
                arguments.append(value)
                kind.append(value and (value.base.dtype, *value.block_shape))
        if bits & 15:  # Triton compiles other code for tensors that do not begin at multiples of 16 bytes
            kind += [address % 16 for address in arguments if isinstance(address, int)]
        compiled = self._compiled.get(key := tuple(kind))
        if compiled is None:
            self._compiled[key] = self._through_triton(given)
        elif _watched():
            compiled[self._programs, 1, 1](*given, *self._known)
        else:
            stream, metadata = driver.get_current_stream(device.index), compiled.packed_metadata
            hooks = (None, None, None)
            compiled.run(self._programs, 1, 1, stream, compiled.function, metadata, *hooks, *arguments, *self._known)


def _watched() -> bool:
    """Whether a profiler may have asked Triton to be told of launches."""
    runtime = triton.knobs.runtime
    try:
        return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
    except AttributeError:
        return True
