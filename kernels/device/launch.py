"""How a kernel starts: on a GPU, in Triton's interpreter on CPU tensors, or recorded for ahead-of-time compilation.

Every launch of this package is a `PreparedLaunch`, so the recorder sees exactly what would run. Host code never reads a
device tensor's value: recorded with tensors on the `meta` device it would raise at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
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
from triton.backends.nvidia.driver import CudaLauncher

__all__ = [
    "INTERPRETED",
    "Launch",
    "PreparedLaunch",
    "Recorder",
    "aligned",
    "architecture",
    "compute_dtype",
    "generation",
    "kinds",
    "passed_on",
    "recording",
    "stream_of",
]

_IN_C = triton.__version__.startswith("3.7.1")
"""Whether Triton's launcher is the one that `_entry` knows."""

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
    return x.clone() if x.data_ptr() & 15 else x


def kinds(first: Tensor, *others: Tensor | None) -> tuple[Hashable, ...]:
    """What a `PreparedLaunch` is for: the device of its tensors, and of each the dtype, None where one is missing."""
    return first.device, first.dtype, *[None if x is None else x.dtype for x in others]


def stream_of(x: Tensor) -> int | None:
    """The current stream of x's GPU, where known launches may start at once; None where each has to be looked at.

    That is: where launches are interpreted or recorded, a profiler watches them, or another GPU is current. A pass asks
    once, since nothing of it changes before the pass is over.
    """
    if INTERPRETED or _recorder.get() is not None:
        return None
    driver, index = triton.runtime.driver.active, x.device.index
    if driver.get_current_device() != index or _watched():
        return None
    stream: int = driver.get_current_stream(index)
    return stream


class PreparedLaunch:
    """A launch of which everything but the tensors is known; calling it with them starts the kernel.

    It is for tensors of the same `kinds`: others need another one. On a GPU the first call goes through Triton, which
    specialises the kernel and compiles it. Later ones start what it made at once, as long as the same addresses are
    multiples of 16: nothing else of such tensors is anything to Triton. That saves most of the host's time. FP fusion
    is off, so that each written product and sum rounds once on its own.

    Args:
        kernel: the jitted function.
        programs: how many instances of it start; nothing happens when there are none.
        num_warps, num_stages: compile options.
        max_registers: how many a thread may have at most; None leaves it to the compiler.
        aligned: which of the tensors must begin at a multiple of 16 bytes; where one does not, a copy takes its place.
        known: the arguments that are no tensors, by name: the last of the kernel's.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        num_warps: int,
        num_stages: int,
        max_registers: int | None = None,
        aligned: tuple[int, ...] = (),
        **known: Any,
    ) -> None:
        self.kernel, self._programs, self._aligned = kernel, programs, aligned
        self._options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}
        if max_registers is not None:
            self._options["maxnreg"] = max_registers
        self._known = tuple(known[name] for name in kernel.arg_names[-len(known) :])
        self._compiled: dict[Any, Any] = {}

    def __call__(self, stream: int | None, *tensors: Any) -> None:
        """Start it on the first tensor's GPU, or interpret or record it.

        Args:
            stream: `stream_of` that tensor.
            tensors: the kernel's, in its order; None where one is missing.
        """
        if not self._programs:
            return
        if stream is None:
            return self._looked_at(tensors)
        arguments: list[Any] = []
        places, bits = None, 0
        for x in tensors:
            if x is None:
                arguments.append(x)
                continue
            try:
                arguments.append(address := x.data_ptr())
                bits |= address
            except AttributeError:  # a descriptor of aligned memory, which Triton takes as it is
                arguments.append(x)
        if bits & 15:
            tensors = self._copied(tensors)
            arguments = [x.data_ptr() if isinstance(x, Tensor) else x for x in tensors]
            places = tuple(x % 16 for x in arguments if isinstance(x, int))
        known = self._compiled.get(places)
        if known is None:
            self._compiled[places] = _entry(self._through_triton(tensors))
            return
        start, between = known
        arguments += self._known
        start(self._programs, 1, 1, stream, *between, arguments)

    def _looked_at(self, tensors: tuple[Any, ...]) -> None:
        """Start it where no stream is known: interpreted, recorded, told to a profiler, or on another GPU."""
        tensors = self._copied(tensors)
        if INTERPRETED or _recorder.get() is not None:
            return self._without_a_gpu(tensors)
        device = tensors[0].device
        if triton.runtime.driver.active.get_current_device() == device.index:
            self._through_triton(tensors)
        else:
            with torch.cuda.device(device):
                self(stream_of(tensors[0]), *tensors)

    def _copied(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        """The tensors, those that must be aligned as copies where they are not."""
        return tuple(aligned(x) if i in self._aligned else x for i, x in enumerate(tensors))

    def _without_a_gpu(self, tensors: tuple[Any, ...]) -> None:
        recorder = _recorder.get()
        if recorder is None:
            with np.errstate(over="ignore", invalid="ignore"):  # IEEE's infinities and NaNs are results here
                self._through_triton(tensors)
        else:
            arguments = dict(zip(self.kernel.arg_names, (*tensors, *self._known), strict=True))
            recorder.launches.append(Launch(self.kernel, arguments, self._options))

    def _through_triton(self, tensors: tuple[Any, ...]) -> Any:
        """Start it as Triton does; the compiled kernel, or None where it is interpreted."""
        return self.kernel[(self._programs,)](*tensors, *self._known, **self._options)


def _entry(compiled: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What starts a compiled kernel, and what that takes between the stream and the list of arguments.

    In Triton 3.7.1 it is a function in C: what is around it allocates scratch memory, of which these kernels have none.
    """
    run, own = compiled.run, (compiled.packed_metadata, None, None, None)
    if _IN_C and isinstance(run, CudaLauncher) and not (run.global_scratch_size or run.profile_scratch_size):
        flags, signature = (run.launch_cooperative_grid, run.launch_pdl), (run.arg_annotations, run.kernel_signature)
        return run.launch, (compiled.function, *flags, *own, None, None, *signature)
    return lambda *given: run(*given[:-1], *given[-1]), (compiled.function, *own)


def _watched() -> bool:
    """Whether a profiler may have asked Triton to be told of launches."""
    runtime = triton.knobs.runtime
    try:
        return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
    except AttributeError:
        return True
