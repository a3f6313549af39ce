"""One kernel to compile as Triton would at a launch, in whatever process.

Triton derives a compilation's key from a launch's arguments: types, which are 1 or multiples of 16, constants, options.
A recorded launch goes through the same function of Triton's, asked not to start, and so leaves in Triton's cache what a
launch on a GPU looks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import MockTensor

from mxref.kernels.device.launch import Launch

__all__ = ["Unit", "compile_launch", "compile_units", "units_of"]


@dataclass(frozen=True)
class Unit:
    """One compilation: a kernel of this package with a launch's arguments; picklable.

    Attributes:
        architecture: such as "sm_90".
        label: what the launch does, for a report.
        module, kernel: where the jitted function lives.
        arguments: by name; a tensor is its dtype alone, aligned to 16 bytes.
        options: compile options by name.
        key: Triton's, which equal compilations of a kernel share.
    """

    architecture: str
    label: str
    module: str
    kernel: str
    arguments: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]
    key: str

    @classmethod
    def of(cls, architecture: str, label: str, launch: Launch) -> Unit:
        """What a launch has Triton compile."""
        arguments = {name: _without_memory(value) for name, value in launch.arguments.items()}
        keys = list[str]()

        def note(key: str, **_: Any) -> bool:
            keys.append(key)
            return True  # it is not to be compiled yet

        with triton.knobs.runtime.scope(), _gpu(architecture, "asks for keys"):
            triton.knobs.runtime.jit_cache_hook = note
            compile_launch(launch)
        function = launch.kernel.fn
        named = tuple(arguments.items()), tuple(launch.options.items())
        return cls(architecture, label, function.__module__, function.__name__, *named, *keys)

    @property
    def function(self) -> Any:
        """The jitted function."""
        return getattr(import_module(self.module), self.kernel)

    def build(self) -> Any:
        """Triton's compiled kernel, from its cache if there."""
        with _gpu(self.architecture, "compiles"):
            return compile_launch(Launch(self.function, dict(self.arguments), dict(self.options)))


def units_of(architecture: str, launches: Iterable[tuple[str, Launch]]) -> Iterator[Unit]:
    """The compilations of labelled launches, each once."""
    seen = set[tuple[str, str, str]]()
    for label, launch in launches:
        unit = Unit.of(architecture, label, launch)
        if (work := (unit.module, unit.kernel, unit.key)) not in seen:
            seen.add(work)
            yield unit


def compile_units(units: Sequence[Unit], jobs: int) -> Iterator[tuple[Unit, bool]]:
    """Compile into Triton's cache in `jobs` processes: each unit when done, and whether it was new.

    The processes are forks, which need no imports; they use no GPU.
    """
    with ProcessPoolExecutor(min(jobs, len(units)) or 1, get_context("fork")) as pool:
        futures = {pool.submit(_build_if_new, unit): unit for unit in units}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _build_if_new(unit: Unit) -> bool:
    found = list[bool]()
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = lambda *, cache_hit, **_: found.append(cache_hit)
        unit.build()
    return found == [False]


def compile_launch(launch: Launch) -> Any:
    """Triton's compiled kernel of a launch, from its cache if there; nothing starts, tensors may be meta."""
    arguments = (_without_memory(value) for value in launch.arguments.values())
    return launch.kernel.run(*arguments, grid=None, warmup=True, **launch.options)


def _without_memory(value: Any) -> Any:
    if isinstance(value, Tensor):
        return MockTensor(value.dtype)
    return replace(value, base=MockTensor(value.base.dtype)) if isinstance(value, TensorDescriptor) else value


class _Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, architecture: str, purpose: str) -> None:
        self._target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
        self._purpose = purpose

    def get_current_device(self) -> tuple[GPUTarget, str]:
        """A key: compiled kernels are kept by device, and one that is there would not be asked for."""
        return self._target, self._purpose

    def get_current_stream(self, device: object) -> None:
        """Not needed to compile."""

    def get_current_target(self) -> GPUTarget:
        return self._target


@contextmanager
def _gpu(architecture: str, purpose: str) -> Iterator[None]:
    """Within it Triton takes this machine's GPU to be of the architecture."""
    drivers = triton.runtime.driver
    before = drivers._active  # `active` would look for a GPU
    drivers.set_active(_Driver(architecture, purpose))
    try:
        yield
    finally:
        drivers.set_active(before)
