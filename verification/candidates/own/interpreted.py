"""What kernels do with addresses under Triton's interpreter, whose loads, stores and arithmetic are watched.

A mask that is missing or too wide often changes no result: what it lets in is dropped later, or multiplied by zero; on
a GPU it may still fault. A 32-bit offset is right until a tensor has 2^31 elements, which no test has time for. So the
arithmetic itself is watched: the sizes of a case stay far below a limit and their products go beyond it, and any 32-bit
sum or product beyond the limit is one that would overflow where the sizes are larger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
from torch import Tensor
from triton.runtime import interpreter

INDEX_LIMIT = 3 << 12
"""What a 32-bit sum or product may reach: more than any one size of the cases asked, or a block's width."""


@contextmanager
def checked_indices() -> Iterator[None]:
    """Within this context a kernel with a 32-bit sum, difference or product beyond INDEX_LIMIT raises."""
    compute = interpreter.InterpreterBuilder.binary_op

    def checked(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        result = compute(self, lhs, rhs, op)
        if op in (np.add, np.subtract, np.multiply) and result.data.dtype == np.int32:
            largest = int(np.abs(result.data.astype(np.int64)).max(initial=0))
            if largest > INDEX_LIMIT:
                raise OverflowError(f"a 32-bit {op.__name__} reaches {largest}, beyond every size of this case")
        return result

    def checked_load(self: Any, ptrs: Any, *rest: Any) -> Any:
        if ptrs.get_element_ty().name in ("int8", "int16"):
            raise OverflowError(f"reads indices of type {ptrs.get_element_ty().name}, too narrow for a row")
        return load(self, ptrs, *rest)

    builder = interpreter.InterpreterBuilder
    load = builder.create_masked_load
    with patch.object(builder, "binary_op", checked), patch.object(builder, "create_masked_load", checked_load):
        yield


class _Touched:
    """The tensors of the launch that runs now, as sorted ranges of addresses, and how many addresses were checked."""

    def __init__(self) -> None:
        self.count = 0
        self._starts = self._ends = np.zeros(0, np.int64)
        self._written: dict[tuple[int, ...], list[npt.NDArray[np.int64]]] = {}

    def enter(self, arguments: list[Any]) -> None:
        """A launch begins, and the one before has ended."""
        self.leave()
        spans = sorted(_span(argument) for argument in arguments if isinstance(argument, Tensor))
        self._starts = np.array([start for start, _ in spans], np.int64)
        self._ends = np.maximum.accumulate(np.array([end for _, end in spans], np.int64))

    def leave(self) -> None:
        """Raise an IndexError if two programs of the launch wrote the same element: the later one would win."""
        own = [np.unique(np.concatenate(parts)) for parts in self._written.values()]
        self._written = {}
        conflicts = sum(each.size for each in own) - np.unique(np.concatenate([*own, np.zeros(0, np.int64)])).size
        if conflicts:
            raise IndexError(f"programs of one launch write {conflicts} elements that another one writes too")

    def write(self, program: tuple[int, ...], live: npt.NDArray[np.int64]) -> None:
        """A program stores to these addresses."""
        self._written.setdefault(program, []).append(live.ravel())

    def check(self, what: str, addresses: npt.NDArray[Any], mask: npt.NDArray[Any], size: int) -> npt.NDArray[np.int64]:
        """The addresses with a mask; an IndexError unless each is a multiple of `size`, whose bytes lie in a tensor."""
        live: npt.NDArray[np.int64] = addresses.astype(np.int64)[np.broadcast_to(mask.astype(bool), addresses.shape)]
        self.count += live.size
        tensor = np.searchsorted(self._starts, live, side="right") - 1
        outside = (tensor < 0) | (live + size > self._ends[tensor])
        if outside.any():
            raise IndexError(f"{what} {int(outside.sum())} of {live.size} elements outside the launch's tensors")
        misaligned = int((live % size != 0).sum())
        if misaligned:
            raise IndexError(f"{what} {misaligned} of {live.size} elements at no multiple of their {size} bytes")
        return live


@contextmanager
def checked_memory() -> Iterator[_Touched]:
    """Within this context an interpreted kernel that leaves its tensors, reads or writes an element at an
    address that no GPU takes, or writes one twice, raises."""
    touched = _Touched()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, to_host = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        touched.check("reads", ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
        return load(self, ptrs, mask, *rest)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        touched.write(tuple(self.grid_idx), touched.check("writes", ptrs.data, mask.data, size))
        return store(self, ptrs, value, mask, *rest)

    def entering(self: Any, args: Any, kwargs: Any) -> Any:
        if not callable(self.grid) and min(self.grid) < 1:
            raise ValueError(f"a launch of {self.grid} programs, which no GPU starts")
        host = to_host(self, args, kwargs)
        touched.enter([*host[0], *host[1].values()])
        return host

    replacements: dict[tuple[Any, str], Callable[..., Any]] = {
        (builder, "create_masked_load"): checked_load,
        (builder, "create_masked_store"): checked_store,
        (executor, "_init_args_hst"): entering,
    }
    patches = [patch.object(owner, name, new) for (owner, name), new in replacements.items()]
    for each in patches:
        each.start()
    try:
        yield touched
        touched.leave()
    finally:
        for each in reversed(patches):
            each.stop()


def _span(tensor: Tensor) -> tuple[int, int]:
    """First address of a tensor's elements, and one past the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1 if tensor.numel() else 0) * tensor.element_size()
