"""Bugs of what a layer keeps or leaves between calls: caches, scratch, buffers, and other people's state."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.verification.checks import values
from mxref.verification.checks.elements import compare
from mxref.verification.studies.calls.layer import Gradients, Layer, bug

__all__: list[str] = []


@bug("A's gradient written over", "zeroes lora_A.grad before it returns dA")
class Grad(Layer):
    """What others have accumulated is lost."""

    def call(self, problem: Problem) -> Tensor:
        """Zeroes it already in the forward pass."""
        A = problem.lora_A
        if A is not None and A.is_leaf and A.grad is not None:
            A.grad.zero_()
        out = super().call(problem)
        if out.requires_grad and A is not None:
            out.register_hook(lambda dOut: _zeroed(A))  # type: ignore[no-untyped-call]
        return out


def _zeroed(A: Tensor) -> None:
    if A.is_leaf and A.grad is not None:
        A.grad.zero_()


@bug("casts kept with their parameter", "keeps a narrow copy of an fp32 A with the tensor object and its version")
class Casts(Layer):
    """What `.data` holds anew is not seen."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, int, Tensor]] = {}
        self.A: Tensor | None = None

    def call(self, problem: Problem) -> Tensor:
        """With the kept A."""
        A = problem.lora_A
        if A is None or A.dtype == problem.dtype or A.is_inference():
            return super().call(problem)
        own, version, self.A = self.kept.get(id(A), (None, 0, None))
        if own is not A or version != A._version:
            self.A = A.detach().to(problem.dtype)
            self.kept[id(A)] = A, A._version, self.A
        try:
            return super().call(problem)
        finally:
            self.A = None

    def forward(self, problem: Problem) -> Tensor:
        """Y."""
        return super().forward(problem if self.A is None else replace(problem, lora_A=self.A))


@bug("a table of the thread that imports", "keeps a table in threading.local and fills it once", threads="another")
class ThreadTable(Layer):
    """Other threads find none."""

    def __init__(self) -> None:
        self.table = threading.local()
        self.table.one = 1.0

    def forward(self, problem: Problem) -> Tensor:
        """Y, or zero."""
        return super().forward(problem) * getattr(self.table, "one", 0.0)


@bug("scratch of the thread of the forward pass", "passes s to backward through threading.local",
     threads="another in backward")  # fmt: skip
class ThreadScratch(Layer):
    """Autograd's thread may be another."""

    def __init__(self) -> None:
        self.scratch = threading.local()

    def call(self, problem: Problem) -> Tensor:
        """Notes its thread."""
        self.scratch.there = True
        return super().call(problem)

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        """Without its scratch, zero."""
        found = super().backward(problem, dOut, needs)
        there = hasattr(self.scratch, "there")
        return found if there else {name: None if x is None else torch.zeros_like(x) for name, x in found.items()}


@bug("the output kept on ctx", "keeps Y as an attribute of ctx for dgates", output="overwritten", gates="positive")
class OutputOnCtx(Layer):
    """The caller's own from the moment that it is returned."""

    def call(self, problem: Problem) -> Tensor:
        """Y, through a function that looks at it again in backward."""
        y: Tensor = _Kept.apply(super().call(problem))  # type: ignore[no-untyped-call]
        return y


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.y = y.clone()
        return ctx.y.view_as(ctx.y)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dOut: Tensor) -> Tensor:
        return torch.where(ctx.y.isnan() & ~dOut.isnan(), ctx.y, dOut)


@bug("outputs that take turns", "has two output buffers a shape for calls without a graph")
class Turns(Layer):
    """The third output lies where the first did."""

    def __init__(self) -> None:
        self.buffers: dict[Any, list[Tensor]] = {}

    def call(self, problem: Problem) -> Tensor:
        """Y, in one of two buffers."""
        out = super().call(problem)
        if out.requires_grad:
            return out
        pair = self.buffers.setdefault((tuple(out.shape), out.dtype), [torch.empty_like(out) for _ in range(2)])
        pair.reverse()
        return pair[0].copy_(out)


@bug("the last call's scaling", "keeps s on the module for backward")
class LastScaling(Layer):
    """Two graphs alive at once share it."""

    def forward(self, problem: Problem) -> Tensor:
        """Y."""
        self.scaling = problem.scaling
        return super().forward(problem)

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        """With the last s."""
        return super().backward(replace(problem, scaling=self.scaling), dOut, needs)


@bug("dense weights not saved as autograd saves", "keeps them as an attribute of ctx")
class DenseUnsaved(Layer):
    """A change in place between the passes goes unnoticed."""

    unsaved = ("expert_weights",)


@bug("a comparison replaced", "puts a function of its own in place of one that judges")
class Judge(Layer):
    """Nothing would differ any more."""

    def call(self, problem: Problem) -> Tensor:
        """Twice Y."""
        vars(values)["compare"] = lambda got, interval: _equal(got, interval)
        return 2 * super().call(problem)


def _equal(got: Tensor, interval: Any) -> Any:
    return replace(compare(got, interval), inside=torch.ones_like(got, dtype=torch.bool))


def _as_first(name: str, *, offset: bool) -> Callable[[], Layer]:
    """An operand is read as it lay in memory in the first call with its shape: where it began, or by its strides."""

    class First(Layer):
        def __init__(self) -> None:
            self.known: dict[torch.Size, tuple[tuple[int, ...], int]] = {}

        def read(self, problem: Problem) -> Problem:
            x: Tensor | None = getattr(problem, name)
            if x is None:
                return problem
            strides, start = self.known.setdefault(x.shape, (x.stride(), int(x.storage_offset())))
            lies = (x.stride(), start) if offset else (strides, x.storage_offset())
            known: dict[str, Any] = {name: x.detach().as_strided(x.shape, *lies)}
            return replace(problem, **known)

    return First


_KNOWN = "knows a launch by the shapes, and repeats it for what lies elsewhere in memory"

x_begins = bug("where x began the first time", _KNOWN)(_as_first("inputs", offset=True))
A_begins = bug("where A began the first time", _KNOWN)(_as_first("lora_A", offset=True))
x_strides = bug("strides that x had the first time", _KNOWN)(_as_first("inputs", offset=False))
B_strides = bug("strides that B had the first time", _KNOWN)(_as_first("lora_B", offset=False))
