"""Gluon kernels of this project run on NumPy, one program after another: what they compute, not how fast or in which
thread.

Triton's interpreter does not know Gluon. Here a kernel's own source runs with `gl` and its companions replaced: layouts
mean nothing, tensors are arrays, inline PTX is executed instruction by instruction, and every load and store is checked
against its buffer. Asynchronous copies arrive as late as they may, when they are waited for; shared memory holds NaN or
all ones before. Products add up in fp64, so give operands whose sums are exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch

__all__ = ["Box", "Pointer", "Shared", "Tensor", "function", "run"]

_DTYPES = {
    "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32, "int32": np.int32, "int64": np.int64,
    "float32": np.float32, "bfloat16": "bfloat16",
}  # fmt: skip


def _bf16(x: Any) -> Any:
    """Rounded to bf16, held in fp32."""
    return torch.from_numpy(np.array(x, np.float32)).to(torch.bfloat16).float().numpy()


class Tensor(np.ndarray):
    """An array with what Gluon's tensors have; bf16 values are held in fp32."""

    type = SimpleNamespace(layout=None)

    def to(self, dtype: Any, bitcast: bool = False) -> Tensor:
        if dtype == "bfloat16":
            wide = (self.astype(np.uint32) << 16).view(np.float32) if bitcast else _bf16(self)
            return np.asarray(wide).view(Tensor)
        return self.astype(dtype)

    def permute(self, order: list[int]) -> Tensor:
        return self.transpose(order)


def _tensor(x: Any) -> Tensor:
    return np.asarray(x).view(Tensor)


class Pointer:
    """Elements of a flat buffer: a base, or a tensor of offsets from it."""

    def __init__(self, buffer: np.ndarray, offsets: Any = 0) -> None:
        self.buffer, self.offsets = buffer, offsets

    def __add__(self, offsets: Any) -> Pointer:
        return Pointer(self.buffer, np.asarray(self.offsets, np.int64) + np.asarray(offsets, np.int64))

    def to(self, dtype: Any) -> Pointer:
        return Pointer(self.buffer.view(dtype), self.offsets)

    def read(self, mask: Any, other: Any) -> Tensor:
        offsets, inside = np.broadcast_arrays(self.offsets, True if mask is None else mask)
        assert ((offsets >= 0) & (offsets < self.buffer.size))[inside].all(), "a load outside its buffer"
        return _tensor(np.where(inside, self.buffer[np.where(inside, offsets, 0)], self.buffer.dtype.type(other)))

    def write(self, value: Any, mask: Any) -> None:
        offsets, value, inside = np.broadcast_arrays(self.offsets, value, True if mask is None else mask)
        assert ((offsets >= 0) & (offsets < self.buffer.size))[inside].all(), "a store outside its buffer"
        self.buffer[offsets[inside]] = value[inside]


class Shared:
    """A view of shared memory."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape = array, array.shape

    def index(self, i: Any) -> Shared:
        return Shared(self.array[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.array[(slice(None),) * dim + (slice(start, start + length),)])

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.array.transpose(order))

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.array.reshape(shape))

    def load(self, layout: Any = None) -> Tensor:
        return _tensor(self.array.copy())

    def store(self, value: Any) -> None:
        self.array[...] = value


class Box:
    """A matrix whose boxes the copy engine fetches; what lies behind it is zero."""

    def __init__(self, matrix: torch.Tensor, shape: tuple[int, int]) -> None:
        self.matrix, self.shape = matrix.float().numpy(), shape
        self.block_type = SimpleNamespace(nbytes=2 * shape[0] * shape[1])

    def read(self, row: int, column: int) -> np.ndarray:
        inside = self.matrix[row : row + self.shape[0], column : column + self.shape[1]]
        return np.pad(inside, [(0, full - part) for full, part in zip(self.shape, inside.shape, strict=True)])


def _key(barrier: Shared) -> int:
    return int(barrier.array.ctypes.data)


class _Copies:
    """Asynchronous copies that have been started: those of groups, and the boxes of each barrier."""

    def __init__(self) -> None:
        self.open, self.groups, self.boxes = (
            list[Callable[[], None]](),
            list[list[Callable[[], None]]](),
            dict[Any, Any](),
        )

    def start(self, shared: Shared, at: Pointer, mask: Any = None) -> None:
        self.open.append(lambda: shared.store(at.read(mask, 0)))

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def start_box(self, box: Box, at: list[Any], barrier: Shared, shared: Shared) -> None:
        self.boxes.setdefault(_key(barrier), []).append(lambda: shared.store(box.read(*map(int, at))))

    def wait_boxes(self, barrier: Shared, phase: Any) -> None:
        """A barrier completes once for each time that its boxes are asked for: phase 0 first."""
        boxes = self.boxes.pop(_key(barrier), [])
        assert boxes, "a wait for boxes that nobody asked for"
        assert int(barrier.array[0]) == int(phase), "a wait for another phase"
        barrier.array[0] ^= 1
        for copy in boxes:
            copy()

    def wait(self, left: int) -> None:
        for group in self.groups[: len(self.groups) - left]:
            for copy in group:
                copy()
        self.groups = self.groups[len(self.groups) - left :]


def _ptx(program: str, constraints: str, operands: list[Any], dtype: Any, **_: Any) -> Any:
    """Runs inline PTX, whose operands $n are the results first."""
    results = len(dtype) if isinstance(dtype, tuple) else 1
    arrays = np.broadcast_arrays(*[np.asarray(getattr(x, "value", x), np.uint32) for x in operands])
    values: dict[str, Any] = {f"${results + n}": array.astype(np.uint32) for n, array in enumerate(arrays)}

    def value(name: str) -> Any:
        return values[name] if name in values else np.uint32(int(name, 0))

    for line in re.sub(r"[{}]", "", program).split(";"):
        if not line.strip() or ".reg" in line:
            continue
        opcode, rest = line.split(None, 1)
        target, *names = (name.strip() for name in rest.split(","))
        values[target] = _OPCODES[opcode](*map(value, names)).astype(np.uint32)
    found = tuple(_tensor(np.broadcast_to(values[f"${n}"], arrays[0].shape)) for n in range(results))
    return found if isinstance(dtype, tuple) else found[0]


def _lop3(a: Any, b: Any, c: Any, table: Any) -> Any:
    found = np.uint32(0)
    for row in range(8):
        if int(table) >> row & 1:
            found = found | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return found


def _prmt(a: Any, b: Any, selector: Any) -> Any:
    bytes_ = [x >> np.uint32(8 * n) & np.uint32(0xFF) for x in (a, b) for n in range(4)]
    return sum(bytes_[int(selector) >> 4 * n & 7] << np.uint32(8 * n) for n in range(4))


def _mul_bf16x2(a: Any, b: Any) -> Any:
    def half(x: Any, n: int) -> Any:
        return np.asarray((x >> np.uint32(16 * n)) << np.uint32(16), np.uint32).view(np.float32)

    with np.errstate(all="ignore"):
        low, high = (_bf16(half(a, n) * half(b, n)).view(np.uint32) >> np.uint32(16) for n in range(2))
    return low | high << np.uint32(16)


_OPCODES: dict[str, Callable[..., Any]] = {
    "mov.b32": lambda a: a,
    "not.b32": lambda a: ~a,
    "and.b32": lambda a, b: a & b,
    "add.u32": lambda a, b: a + b,
    "mul.lo.u32": lambda a, b: a * b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "shl.b32": lambda a, n: a << n,
    "shr.u32": lambda a, n: a >> n,
    "shf.r.wrap.b32": lambda low, high, n: low >> n | high << np.uint32(32 - int(n)),
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "mul.rn.bf16x2": _mul_bf16x2,
}


def _product(a: Any, b: Shared, acc: Any, is_async: bool = False) -> Tensor:
    return _tensor((acc.astype(np.float64) + a.astype(np.float64) @ b.array.astype(np.float64)).astype(np.float32))


def _unset(dtype: Any, shape: list[int], layout: Any) -> Shared:
    real = np.float32 if dtype == "bfloat16" else dtype
    return Shared(np.full(shape, np.nan if real == np.float32 else np.iinfo(real).max, real))


class _NoLayout:
    def __init__(self, *_: Any) -> None: ...

    @staticmethod
    def get_default_for(*_: Any) -> None: ...


class _Gl(SimpleNamespace):
    """`gl`: every layout is None."""

    def __getattr__(self, name: str) -> Any:
        assert name.endswith("Layout"), name
        return _NoLayout


def _modules(program: int, copies: _Copies) -> dict[str, Any]:
    """What a kernel's module sees of Gluon while one program runs."""
    gl = _Gl(
        **_DTYPES,
        arange=lambda a, b, layout=None: _tensor(np.arange(a, b, dtype=np.int32)),
        zeros=lambda shape, dtype, layout=None: _tensor(np.zeros(shape, np.float32 if dtype == "bfloat16" else dtype)),
        where=lambda c, a, b: np.where(c, a, b).view(Tensor) if np.ndim(c) else (a if c else b),
        minimum=lambda a, b: np.minimum(a, b).view(Tensor),
        cdiv=lambda a, b: -(-a // b),
        load=lambda at, mask=None, other=0: at.read(mask, other),
        store=lambda at, value, mask=None: at.write(value, mask),
        program_id=lambda axis: program,
        static_range=range,
        assume=lambda condition: None,
        allocate_shared_memory=_unset,
        join=lambda a, b: _tensor(np.stack(np.broadcast_arrays(a, b), -1)),
        split=lambda x: (x[..., 0], x[..., 1]),
        expand_dims=lambda x, axis: np.expand_dims(x, axis).view(Tensor),
        broadcast=lambda a, b: tuple(x.view(Tensor) for x in np.broadcast_arrays(a, b)),
        convert_layout=lambda x, layout, assert_trivial=False: x,
        inline_asm_elementwise=_ptx,
        pointer_type=lambda dtype: dtype,
        constexpr=lambda x: x,
    )
    hopper = SimpleNamespace(
        fence_async_shared=lambda: None,
        warpgroup_mma=_product,
        warpgroup_mma_init=lambda acc: acc,
        warpgroup_mma_wait=lambda left, deps: tuple(deps) if len(deps) > 1 else deps[0],
    )
    copy = SimpleNamespace(async_copy_global_to_shared=copies.start, commit_group=copies.commit, wait_group=copies.wait)
    mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda barrier, count: barrier.store(0),
        expect=lambda barrier, nbytes: None,
        wait=copies.wait_boxes,
        invalidate=lambda barrier: None,
    )
    tma = SimpleNamespace(async_copy_global_to_shared=copies.start_box)
    return {"gl": gl, "hopper": hopper, "mbarrier": mbarrier, "tma": tma, "async_copy": copy, "barrier": lambda: None}


def function(jitted: Any, program: int = 0, copies: _Copies | None = None) -> Callable[..., Any]:
    """A Gluon function as a Python function on arrays; the Gluon functions that it calls likewise."""
    names: dict[str, Any] = dict(jitted.fn.__globals__)
    fakes = _modules(program, copies or _Copies())
    for name, thing in names.items():
        if hasattr(thing, "is_gluon") and thing.is_gluon() and thing is not jitted:
            names[name] = _Later(thing, program, copies)
        elif type(thing).__name__ == "constexpr":
            names[name] = thing.value
        elif type(thing).__name__ == "ConstexprFunction":
            names[name] = lambda *_: None
    plain = FunctionType(jitted.fn.__code__, names | fakes, jitted.fn.__name__, jitted.fn.__defaults__)
    plain.__globals__[jitted.fn.__name__] = plain
    return plain


class _Later:
    """A Gluon function that another calls, made when it does."""

    def __init__(self, *given: Any) -> None:
        self.given = given

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return function(*self.given)(*arguments, **named)


def run(kernel: Any, programs: int, **arguments: Any) -> None:
    """Run a Gluon kernel on CPU tensors, which `arguments` holds among its other arguments; bf16 ones are not written
    in place: give an fp32 one for results."""
    given = {name: _argument(value) for name, value in arguments.items()}
    for program in range(programs):
        with np.errstate(all="ignore"):
            function(kernel, program, _Copies())(**given)


def _argument(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return Pointer((value.float() if value.dtype == torch.bfloat16 else value).detach().numpy().reshape(-1))
