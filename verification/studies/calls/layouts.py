"""Bugs of how operands lie in memory: strides, offsets, index dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.verification.studies.calls.layer import Gradients, Layer, bug
from mxref.weights import MXWeights

__all__ = ["as_if_contiguous"]


def as_if_contiguous(x: Tensor, start: int | None = None) -> Tensor:
    """What is read by a kernel that knows an address and a shape, but no stride; `start` None for x's own address."""
    size = x.untyped_storage().nbytes() // x.element_size()
    if not x.numel():
        return x
    memory = x.detach().as_strided((size,), (1,), 0)
    places = (x.storage_offset() if start is None else start) + torch.arange(x.numel(), device=x.device)
    return memory[places % size].view(x.shape)


def _from_the_start(x: Tensor) -> Tensor:
    """With its strides, but from the beginning of its storage."""
    return x.detach().as_strided(x.shape, x.stride(), 0)


def _unit_columns(x: Tensor) -> Tensor:
    """With its row stride, its columns taken as neighbours."""
    size = x.untyped_storage().nbytes() // x.element_size()
    if not x.numel():
        return x
    memory = x.detach().as_strided((size,), (1,), 0)
    rows, columns = (torch.arange(n, device=x.device) for n in x.shape)
    return memory[(x.storage_offset() + rows[:, None] * x.stride(0) + columns) % size]


def _misread(how: Callable[[Tensor], Tensor], *names: str) -> Callable[[], Layer]:
    class Misread(Layer):
        def read(self, problem: Problem) -> Problem:
            operands = {name: getattr(problem, name) for name in names}
            misread: dict[str, Any] = {name: how(x) for name, x in operands.items() if isinstance(x, Tensor)}
            return replace(problem, **misread)

    return Misread


def _misread_dOut(how: Callable[[Tensor], Tensor]) -> Callable[[], Layer]:
    class Misread(Layer):
        def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
            return super().backward(problem, how(dOut), needs)

    return Misread


_NO_STRIDES = "hands a kernel the address and the shape, and neither strides nor a contiguous copy"

x = bug("x read as contiguous", _NO_STRIDES, layout_of_x="transposed")(_misread(as_if_contiguous, "inputs"))
A = bug("A read as contiguous", _NO_STRIDES, layout_of_A="transposed")(_misread(as_if_contiguous, "lora_A"))
B = bug("B read as contiguous", _NO_STRIDES, layout_of_B="sliced")(_misread(as_if_contiguous, "lora_B"))
biases = bug("biases read as contiguous", _NO_STRIDES, layout_of_biases="sliced", biases="there")(
    _misread(as_if_contiguous, "expert_biases")
)
gates = bug("gates read as contiguous", _NO_STRIDES, layout_of_gates="transposed", gates="positive")(
    _misread(as_if_contiguous, "gates")
)
dense = bug("dense weights read as contiguous", _NO_STRIDES, weights="dense")(
    _misread(as_if_contiguous, "expert_weights")
)
dense_turned = bug(
    "dense weights read as a transposed view", "takes dense weights for a view of [E, N, K], as its own loader makes",
    weights="dense", layout_of_weights="transposed",
)(_misread(lambda W: as_if_contiguous(W).view(W.shape[0], W.shape[2], W.shape[1]).mT, "expert_weights"))  # fmt: skip
dOut = bug("dOut read as contiguous", _NO_STRIDES, layout_of_dOut="transposed")(_misread_dOut(as_if_contiguous))

x_columns = bug(
    "columns of x taken as neighbours", "passes the row stride of x and no column stride", layout_of_x="sliced"
)(_misread(_unit_columns, "inputs"))
A_columns = bug(
    "columns of A taken as neighbours", "passes the row stride of A and no column stride", layout_of_A="sliced"
)(_misread(_unit_columns, "lora_A"))

x_offset = bug("offset of x lost", "takes the storage's address for the tensor's", layout_of_x="offset")(
    _misread(_from_the_start, "inputs")
)
adapters_offset = bug("offset of A and B lost", "takes the storage's address for the tensor's", layout_of_A="offset")(
    _misread(_from_the_start, "lora_A", "lora_B")
)
dOut_offset = bug("offset of dOut lost", "takes the storage's address for the tensor's", layout_of_dOut="offset")(
    _misread_dOut(_from_the_start)
)
dOut_expanded = bug(
    "an expanded dOut as one row", "makes a buffer of the memory that dOut has, not of its shape",
    layout_of_dOut="expanded",
)(_misread_dOut(lambda g: torch.cat((g[:1], torch.zeros_like(g[1:]))) if g.stride(0) == 0 else g))  # fmt: skip


positions_strided = bug("positions read as contiguous", _NO_STRIDES, layout_of_positions="sliced")(
    _misread(as_if_contiguous, "sorted_scattered_idxs")
)
offsets_strided = bug("expert_offsets read as contiguous", _NO_STRIDES, layout_of_offsets="sliced")(
    _misread(as_if_contiguous, "expert_offsets")
)
indices_offset = bug(
    "offset of positions lost", "takes the storage's address for the tensor's", layout_of_positions="offset"
)(_misread(_from_the_start, "sorted_scattered_idxs"))


@bug("strides of expert ids taken for all indices", "copies the routing tensors where the first of them is strided",
     layout_of_expert_ids="contiguous", layout_of_positions="sliced")  # fmt: skip
class PositionsAlone(Layer):
    """Strided positions beside contiguous ids are misread."""

    def read(self, problem: Problem) -> Problem:
        if not problem.sorted_expert_idxs.is_contiguous():
            return problem
        return replace(problem, sorted_scattered_idxs=as_if_contiguous(problem.sorted_scattered_idxs))


@bug("overlapping rows read one behind the other", "copies x where a stride is larger than what it spans",
     layout_of_x="overlapping")  # fmt: skip
class Overlapping(Layer):
    """Windows of a sequence."""

    def read(self, problem: Problem) -> Problem:
        x = problem.inputs
        overlapping = x.stride(1) == 1 and 0 < x.stride(0) < x.shape[1]
        return replace(problem, inputs=as_if_contiguous(x)) if overlapping else problem


@bug("a dOut that begins late taken as dense", "makes an address from an offset and the number of columns",
     layout_of_dOut="padded", storage="shared")  # fmt: skip
class Within(Layer):
    """A block of a larger gradient."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        begins_late = dOut.storage_offset() > 0 and dOut.stride(-1) == 1
        return super().backward(problem, as_if_contiguous(dOut) if begins_late else dOut, needs)


dense_offset = bug(
    "offset of dense weights lost", "takes the storage's address", weights="dense", layout_of_weights="offset"
)(_misread(_from_the_start, "expert_weights"))


class _PackedFromTheStart(Layer):
    names: tuple[str, ...]

    def read(self, problem: Problem) -> Problem:
        weights = problem.expert_weights
        if not isinstance(weights, MXWeights):
            return problem
        misread: dict[str, Any] = {name: _from_the_start(getattr(weights, name)) for name in self.names}
        return replace(problem, expert_weights=replace(weights, **misread))


@bug(
    "offset of packed lost",
    "a slice of a buffer of all layers: takes the buffer's address",
    weights="packed",
    layout_of_weights="offset",
)
class Packed(_PackedFromTheStart):
    """The codes of what lies before."""

    names = ("packed",)


@bug(
    "offset of scales lost",
    "takes the storage's address for the tensor's",
    weights="packed",
    layout_of_weights="offset",
)
class Scales(_PackedFromTheStart):
    """The scales of what lies before."""

    names = ("scales",)


@bug("int32 positions read as int64", "declares the pointer's type once, for int64", indices="int32")
class Indices(Layer):
    """Every second entry, twice."""

    def read(self, problem: Problem) -> Problem:
        positions = problem.sorted_scattered_idxs
        if positions.dtype == torch.int64:
            return problem
        halves = positions[: positions.numel() // 2 * 2 : 2]
        misread = torch.cat((halves, halves, positions[:1]))[: positions.numel()]
        return replace(problem, sorted_scattered_idxs=misread)


@bug("view of dOut", "asks for a view where a copy may be needed", layout_of_dOut="sliced", gates="positive")
class View(Layer):
    """Raises for layouts that cannot be viewed."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        return super().backward(problem, dOut.view(-1).view(dOut.shape), needs)
