"""How a caller calls: what leaves the mathematics alone and yet reaches other code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from zlib import crc32

import torch
from torch import Tensor

T = TypeVar("T")
Layout = Literal[
    "contiguous", "transposed", "sliced", "padded", "offset", "apart", "innermost", "middle", "overlapping",
    "expanded", "one column", "one number", "one row",
]  # fmt: skip
REPEATED: tuple[Layout, ...] = ("overlapping", "expanded", "one column", "one number")
"""Those that have elements, rows or columns in memory once."""
ONE_ROW: tuple[Layout, ...] = ("expanded", "one number")
"""Those of them all of whose rows are one."""
_OF_GATES: dict[Layout, Layout] = {"expanded": "one column", "one row": "expanded"}
"""One gate a token, repeated, is how gates are expanded; or all tokens have one row of them."""
Storage = Literal["its own", "shared"]
Mode = Literal["grad", "no_grad", "inference"]
Autocast = Literal["off", "forward pass", "forward pass to fp16", "backward pass to fp16", "both passes"]
Algorithms = Literal["any", "deterministic", "strictly deterministic"]
Saved = Literal["kept", "copied", "checkpoint", "reentrant checkpoint"]
Owner = Literal["leaf", "parameter", "computed"]
Arguments = Literal["spelled out", "defaults left out"]
Backward = Literal["at once", "one by one", "create_graph", "accumulated"]
Threads = Literal["one", "another", "another in backward"]
Output = Literal["kept", "overwritten", "dropped"]


@dataclass(frozen=True)
class Call:
    """One way to call.

    Attributes:
        x, A, B, biases, gates, weights, ids, rows, ends, dOut: how an operand lies in memory, see `lay_out`; `gates`
            expanded are one a token that its slots share, `weights` dense ones or packed bytes and scales, `ids`,
            `rows` and `ends` sorted_expert_idxs, sorted_scattered_idxs and expert_offsets.
        storage: each operand has a storage of its own, or lies in one behind something else, whatever its layout.
        index: dtype of the routing tensors; `positions`, `offsets`: of sorted_scattered_idxs and of expert_offsets,
            where it is another one.
        owner: what needs a gradient is a leaf of the graph, an nn.Parameter (x and gates: a leaf), or the result of
            something else.
        arguments: every keyword is given, or those that hold their defaults are left out.
        needs: gradients that are asked for, of "dX", "dA", "dB", "dbias", "dgates"; None for all that can be.
        mode: under which gradient mode the forward pass runs; no gradient is asked for but in "grad". In "inference" x,
            gates and the routing are made there too.
        backward: the gradients are asked for at once; one after the other, over a retained graph; with `create_graph`;
            or by two backward passes over a retained graph that accumulate in `.grad`, which holds none before.
        autocast: around which passes, to bf16 unless it says fp16.
        algorithms: in both passes any; or deterministic ones, where others warn, or raise.
        saved: what the backward pass reads is kept; or hooks give it copies; or a checkpointed region, or the older,
            reentrant one, runs the forward pass again.
        default_dtype, default_device: torch's, around both passes; the device where models are built without memory.
        threads: the call is made in the main thread, or in another one, or its backward pass is asked for in another.
        output: what the call returned stays as it is until the backward pass; or the caller has overwritten it by then;
            or has gone on with a product of it, and keeps neither it nor an operand but the leaves.
    """

    x: Layout = "contiguous"
    A: Layout = "contiguous"
    B: Layout = "contiguous"
    biases: Layout = "contiguous"
    gates: Layout = "contiguous"
    weights: Layout = "contiguous"
    ids: Layout = "contiguous"
    rows: Layout = "contiguous"
    ends: Layout = "contiguous"
    dOut: Layout = "contiguous"
    storage: Storage = "its own"
    index: torch.dtype = torch.int64
    positions: torch.dtype | None = None
    offsets: torch.dtype | None = None
    owner: Owner = "leaf"
    arguments: Arguments = "spelled out"
    needs: tuple[str, ...] | None = None
    mode: Mode = "grad"
    backward: Backward = "at once"
    autocast: Autocast = "off"
    algorithms: Algorithms = "any"
    saved: Saved = "kept"
    default_dtype: torch.dtype = torch.float32
    default_device: Literal["", "meta"] = ""
    threads: Threads = "one"
    output: Output = "kept"

    def layout(self, operand: str) -> Layout:
        """Of an operand by its name in `Problem`, or "grad_out"."""
        named: dict[str, Layout] = {
            "inputs": self.x, "lora_A": self.A, "lora_B": self.B, "expert_biases": self.biases,
            "gates": _OF_GATES.get(self.gates, self.gates), "expert_weights": self.weights,
            "sorted_expert_idxs": self.ids, "sorted_scattered_idxs": self.rows, "expert_offsets": self.ends,
            "packed": self.weights, "scales": self.weights, "grad_out": self.dOut,
        }  # fmt: skip
        return named.get(operand, "contiguous")

    def lay_out(self, operand: str, x: Tensor) -> Tensor:
        """A copy that lies in memory as the call has this operand, by its name as above, "packed" or "scales"."""
        return lay_out(x, self.layout(operand), _BEFORE if self.storage == "shared" else 0)

    def wants(self, gradient: str) -> bool:
        """Whether a gradient is asked for, given that its operand is there."""
        return self.mode == "grad" and self.requires(gradient)

    def requires(self, gradient: str) -> bool:
        """Whether its operand requires a gradient, which it also does where the mode records none."""
        return self.needs is None or gradient in self.needs

    @contextmanager
    def surroundings(self, device_type: str) -> Iterator[None]:
        """What surrounds the forward pass, but for checkpointing."""
        modes: dict[Mode, Any] = {
            "grad": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode
        }  # fmt: skip
        copying = torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda copy: copy)
        with (
            modes[self.mode](), _autocast(device_type, self.autocast, "forward pass"), self.in_both_passes(),
            copying if self.saved == "copied" else nullcontext(),
        ):  # fmt: skip
            yield

    @contextmanager
    def around_backward(self, device_type: str) -> Iterator[None]:
        """What surrounds the backward pass."""
        with _autocast(device_type, self.autocast, "backward pass"), self.in_both_passes():
            yield

    @contextmanager
    def in_both_passes(self) -> Iterator[None]:
        """What surrounds both passes, for all threads. It puts back only what it changes: the rest is to be seen."""
        with ExitStack() as surroundings:
            if self.algorithms != "any":
                surroundings.enter_context(_deterministic(warn_only=self.algorithms == "deterministic"))
            if self.default_dtype != torch.float32:
                surroundings.enter_context(_by_default(self.default_dtype))
            if self.default_device:
                surroundings.enter_context(torch.device(self.default_device))
            yield


def _autocast(device_type: str, where: Autocast, in_pass: str) -> AbstractContextManager[object]:
    if where != "both passes" and not where.startswith(in_pass):
        return nullcontext()
    return torch.autocast(device_type, torch.float16 if "fp16" in where else torch.bfloat16)


@contextmanager
def _deterministic(warn_only: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _by_default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def in_another_thread(function: Callable[[], T]) -> T:
    """What a function returns, or raises, in a thread that ends with it."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result()


_OFFSETS = 13, 8, 4, 2, 16
_BEFORE = 64
"""Elements before an operand in a storage that it shares: a whole number of the 16 bytes that wide loads want."""


def lay_out(x: Tensor, layout: Layout, before: int = 0) -> Tensor:
    """The same values in fresh memory that lies otherwise, behind so many other elements of its storage.

    transposed: the last two dimensions are exchanged in memory, where it may be the second half of a taller tensor, or
    the first columns of a wider one, whose rows may begin at multiples of 16.  sliced: every second column of a wider
    tensor, or the first of three numbers in each place of one.  padded: the first columns of a wider tensor, of one
    four times as wide, or either half of one whose rows begin at multiples of 16.  offset: 2 to 16 elements behind the
    start of a larger buffer.  apart: every second row (of three dimensions: matrix) of a taller one, from its second
    on.  innermost: the first dimension has stride 1, and the others follow in their order.  middle: the first two
    dimensions are exchanged in memory.  overlapping: windows of one long row, each half a row behind the one before.
    expanded: one row or matrix, repeated with stride 0; one column, and one number, likewise. What is repeated must be
    equal. Of several ways shape and dtype choose one, so that many cases have each.

    Memory in between holds NaN, or 0 of integers. Whatever has no element stays as it is; so does whatever has one
    dimension, unless it is sliced, offset, or expanded and the same everywhere.
    """

    def memory(*shape: int, before: int = before) -> Tensor:
        nothing = float("nan") if x.is_floating_point() else 0
        return x.new_full((before + math.prod(shape),), nothing)[before:].view(shape)

    if not x.numel() or (x.ndim < 2 and layout not in ("sliced", "offset", "expanded")):
        layout = "contiguous"
    if layout == "expanded" and x.ndim < 2 and bool((x != x[0]).any()):
        layout = "contiguous"
    *rows, columns = x.shape
    checksum = crc32(f"{x.shape} {x.dtype}".encode())
    way = checksum % 4
    match layout, way:
        case "contiguous", _:
            inside = memory(*x.shape)
        case "transposed", 0:
            inside = memory(*x.mT.shape).mT
        case "transposed", 1:
            inside = memory(*rows[:-1], 2 * columns, rows[-1])[..., columns:, :].mT
        case "transposed", 2:
            inside = memory(*rows[:-1], columns, rows[-1] + 7)[..., :-7].mT
        case "transposed", _:
            inside = memory(*rows[:-1], columns, rows[-1] // 16 * 16 + 16)[..., : rows[-1]].mT
        case "sliced", 0:
            inside = memory(*rows, 2 * columns)[..., ::2]
        case "sliced", _:
            inside = memory(*rows, columns + 3, 3)[..., :-3, 0]
        case "padded", 0:
            inside = memory(*rows, columns + 5)[..., :-5]
        case "padded", 3:
            inside = memory(*rows, 4 * columns)[..., :columns]
        case "padded", _:
            wide = memory(*rows, -(-2 * columns // 16) * 16)
            inside = wide[..., :columns] if way == 1 else wide[..., -columns:]
        case "offset", _:
            inside = memory(*x.shape, before=before + _OFFSETS[checksum // 4 % len(_OFFSETS)])
        case "apart", _:
            inside = memory(2 * x.shape[0], *x.shape[1:])[1::2]
        case "innermost", _:
            inside = memory(*x.shape[1:], x.shape[0]).movedim(-1, 0)
        case "middle", _:
            inside = memory(*x.transpose(0, 1).shape).transpose(0, 1)
        case "overlapping", _:
            row = long_row(x)
            return memory(len(row)).copy_(row).unfold(0, columns, window_step(columns))
        case "expanded", _:
            return memory(1, *x.shape[1:]).copy_(x[:1]).expand(x.shape)
        case "one column", _:
            return memory(len(x), 1).copy_(x[:, :1]).expand(x.shape)
        case "one number", _:
            return memory(1, 1).copy_(x[:1, :1]).expand(x.shape)
    return inside.copy_(x)


def long_row(x: Tensor) -> Tensor:
    """The row of which overlapping rows are windows, filled by one after the other."""
    return torch.cat((x[0], x[1:, x.shape[1] - window_step(x.shape[1]) :].flatten()))


def window_step(columns: int) -> int:
    """How far apart overlapping rows begin."""
    return max(columns // 2, 1)
