"""A step's kernels, compiled in threads before it starts.

Triton compiles kernels one by one at their first launch. Here the step first runs on meta tensors, its launches are
recorded, and their kernels are compiled at once: the compilers let other threads run. No thread is left.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from traceback import format_exception
from typing import Any

import torch
import triton
from torch import Tensor

from mxref.kernels.compiled.units import compile_launch
from mxref.kernels.device.launch import Launch, architecture, recording

__all__ = ["compile_in_threads"]

_Compilation = tuple[Future[Any], Callable[[Any], None]]
"""A kernel to come, and what puts it where launches look."""


def compile_in_threads(step: Callable[[], object], operand: Tensor) -> bool:
    """Compile what a step will start, as many kernels at once as there are cores.

    The step runs in its own thread, without the caller's modes, hooks and grad mode.

    Args:
        step: makes its operands by itself, on the `meta` device.
        operand: one of the real step, on the GPU to compile for.

    Returns:
        Whether it was done; False where the step raises, as the real one will.

    Raises:
        Exception: Triton's, where a kernel does not compile, as at its launch.
    """
    with ThreadPoolExecutor(1 + (os.cpu_count() or 1)) as pool:  # starts no more threads than it has work for
        launches = pool.submit(_launches, step, architecture(operand.device)).result()
        for compilation, put_in_place in pool.submit(_submit, pool, launches or (), operand).result():
            put_in_place(compilation.result())
    return launches is not None


def _launches(step: Callable[[], object], architecture: str) -> list[Launch] | None:
    with recording(architecture) as recorder, torch.device("meta"):
        try:
            step()
        except Exception:  # such as operands that are refused
            return None
    return recorder.launches


def _submit(pool: ThreadPoolExecutor, launches: Iterable[Launch], operand: Tensor) -> list[_Compilation]:
    current: Any = torch.cuda.device_of
    with current(operand), _Submitted(pool) as submitted:  # a thread has its own current GPU
        for launch in launches:
            compile_launch(launch)
    return list(submitted.compilations.values())


class _Submitted(triton.AsyncCompileMode):  # type: ignore[misc]  # Triton has no types
    """Triton's mode, but other threads' launches never meet a kernel that is not compiled or could not be."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        super().__init__(pool)
        self.compilations = dict[str, _Compilation]()

    def submit(self, key: str, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]) -> None:
        """Begin to compile; None, which Triton puts where launches look, means not yet."""
        if key not in self.compilations:
            self.compilations[key] = self.executor.submit(_compiled, compile_fn), finalize_fn


def _compiled(compile_fn: Callable[[], Any]) -> Any:
    """What is compiled; again where Python before 3.13 took two threads' parsing for one deep recursion."""
    for _ in range(9):
        try:
            return compile_fn()
        except Exception as error:  # Triton wraps what it meets
            if "AST constructor recursion depth mismatch" not in "".join(format_exception(error)):
                raise
    return compile_fn()
