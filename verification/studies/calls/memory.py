"""Bugs of what a call remembers, shares or overwrites."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.verification.studies.calls.layer import Gradients, Layer, bug
from mxref.weights import MXWeights


def cached(operand: str, key: Callable[[Problem, Any], Hashable]) -> Callable[[], Layer]:
    """A copy of an operand, made once a key."""

    class Cached(Layer):
        def __init__(self) -> None:
            self.cache: dict[Hashable, Any] = {}

        def read(self, problem: Problem) -> Problem:
            value = getattr(problem, operand)
            if value is None:
                return problem
            kept = self.cache.setdefault(key(problem, value), copied(value))
            return replace(problem, **{operand: kept})

    return Cached


def copied(value: Any) -> Any:
    """An operand of its own memory."""
    if isinstance(value, MXWeights):
        return replace(value, packed=value.packed.clone(), scales=value.scales.clone())
    return value.detach().clone() if isinstance(value, Tensor) else value


def _form(x: Tensor) -> Hashable:
    return tuple(x.shape), x.dtype


_STALE = "keeps a cast or packed copy of an operand and looks it up by what does not change with its values"

A_by_address = bug("A cached by address", _STALE)(cached("lora_A", lambda p, A: (A.data_ptr(), _form(A))))
A_by_id = bug("A cached by id", _STALE)(cached("lora_A", lambda p, A: (id(A), _form(A))))
A_by_version = bug(
    "casts kept while the version stays", "looks a cast of A up by address and version, which .data goes round"
)(cached("lora_A", lambda p, A: (A.data_ptr(), object() if A.is_inference() else A._version, _form(A), A.stride())))
biases_by_address = bug("biases cached by address", _STALE)(
    cached("expert_biases", lambda p, biases: (biases.data_ptr(), _form(biases)))
)
B_by_shape = bug("B cached by shape", _STALE)(cached("lora_B", lambda p, B: _form(B)))
x_by_address = bug("x cached by address", _STALE)(cached("inputs", lambda p, x: (x.data_ptr(), _form(x))))
weights_by_address = bug("packed weights cached by address", _STALE)(
    cached("expert_weights", lambda p, W: W.packed.data_ptr() if isinstance(W, MXWeights) else id(W))
)
weights_by_id = bug("decoded weights cached by id", _STALE)(
    cached("expert_weights", lambda p, W: (id(W), p.E, p.K, p.N, p.dtype))
)
positions_by_shape = bug("routing cached by its length", "sorts once a number of rows, as in a benchmark")(
    cached("sorted_scattered_idxs", lambda p, positions: p.P)
)


@bug("scaling of the first call", "takes s when the layer is built")
class Scaling(Layer):
    """State of a module."""

    def __init__(self) -> None:
        self.scaling: float | None = None

    def read(self, problem: Problem) -> Problem:
        if problem.rank and self.scaling is None:
            self.scaling = problem.scaling
        return problem if self.scaling is None else replace(problem, scaling=self.scaling)


@bug("a grid for the first call's rows", "sizes its grid once and never again", rows="hundreds an expert")
class Grid(Layer):
    """Rows beyond those of the first call stay zero."""

    def __init__(self) -> None:
        self.rows = 0

    def forward(self, problem: Problem) -> Tensor:
        y = super().forward(problem)
        self.rows = self.rows or len(y)
        y[self.rows :] = 0
        return y


@bug("x of the last call", "keeps x on the module for backward")
class LastX(Layer):
    """Right as long as every forward pass is followed by its own backward pass."""

    def __init__(self) -> None:
        self.x: Tensor | None = None

    def forward(self, problem: Problem) -> Tensor:
        self.x = problem.inputs.detach()
        return super().forward(problem)

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        kept = self.x if self.x is not None and self.x.shape == problem.inputs.shape else problem.inputs
        return super().backward(replace(problem, inputs=kept), dOut, needs)


@bug("adapters of the last call", "keeps A and B on the module for backward")
class LastAdapters(Layer):
    """Two layers that share an object, or one that is switched between adapters."""

    def __init__(self) -> None:
        self.last: Problem | None = None

    def forward(self, problem: Problem) -> Tensor:
        self.last = replace(problem, lora_A=copied(problem.lora_A), lora_B=copied(problem.lora_B))
        return super().forward(problem)

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        last = self.last
        if last is not None and last.rank == problem.rank and (last.E, last.K, last.N) == (
            problem.E, problem.K, problem.N
        ):  # fmt: skip
            problem = replace(problem, lora_A=last.lora_A, lora_B=last.lora_B)
        return super().backward(problem, dOut, needs)


@bug("one output buffer a shape", "returns the same memory in every call of a shape")
class Buffer(Layer):
    """An output that a caller still holds changes under its hands."""

    def __init__(self) -> None:
        self.buffers: dict[Hashable, Tensor] = {}

    def forward(self, problem: Problem) -> Tensor:
        y = super().forward(problem)
        return self.buffers.setdefault(_form(y), torch.empty_like(y)).detach().copy_(y)


@bug("one buffer a gradient's shape", "returns the same memory in every backward pass")
class GradientBuffer(Layer):
    """Gradients that a caller still holds change under its hands."""

    def __init__(self) -> None:
        self.buffers: dict[Hashable, Tensor] = {}

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        def kept(name: str, x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            return self.buffers.setdefault((name, _form(x)), torch.empty_like(x)).detach().copy_(x)

        return {name: kept(name, x) for name, x in super().backward(problem, dOut, needs).items()}


@bug("gates summed over calls", "adds to a buffer that it zeroes only once", gradients="biases and gates")
class Accumulated(Layer):
    """The second backward pass of a shape holds the first one's gradients too."""

    def __init__(self) -> None:
        self.sums: dict[Hashable, Tensor] = {}

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found = super().backward(problem, dOut, needs)
        if (dgates := found["dgates"]) is not None:
            self.sums[_form(dgates)] = dgates + self.sums.get(_form(dgates), 0)
            found["dgates"] = self.sums[_form(dgates)].clone()
        return found


@bug("x zeroed where no expert owns its rows", "masks an operand in place", routing="sentinels")
class XWritten(Layer):
    """The caller's x."""

    def read(self, problem: Problem) -> Problem:
        away = problem.row_sources()[problem.sorted_expert_idxs >= problem.E]
        here = problem.row_sources()[problem.sorted_expert_idxs < problem.E]
        problem.inputs.detach()[away[~torch.isin(away, here)]] = 0
        return problem


@bug("ids clamped in place", "clamps the caller's expert ids for its own lookups")
class IdsWritten(Layer):
    """The caller's routing: a second layer that shares it sees other ids."""

    def read(self, problem: Problem) -> Problem:
        problem.sorted_expert_idxs.clamp_(max=problem.E)
        return problem


@bug("positions of other ranks' rows zeroed", "parks rows that nobody owns at position 0, in the caller's tensor",
     routing="sentinels")  # fmt: skip
class PositionsWritten(Layer):
    """The caller's routing, where there are sentinels."""

    def forward(self, problem: Problem) -> Tensor:
        y = super().forward(problem)
        problem.sorted_scattered_idxs.data[problem.sorted_expert_idxs >= problem.E] = 0
        return y


@bug("eight graphs at most", "keeps x for backward in a ring of eight")
class Ring(Layer):
    """A pipeline has as many microbatches under way as it has stages."""

    def __init__(self) -> None:
        self.ring: list[Tensor | None] = [None] * 8
        self.calls = 0

    def call(self, problem: Problem) -> Tensor:
        return _InRing(self, self.calls % len(self.ring))(**problem.arguments())


class _InRing(Layer):
    def __init__(self, shared: Ring, place: int) -> None:
        self.shared, self.place = shared, place

    def forward(self, problem: Problem) -> Tensor:
        self.shared.ring[self.place] = problem.inputs.detach().clone()
        self.shared.calls += 1
        return super().forward(problem)

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        x = self.shared.ring[self.place]
        if x is not None and x.shape == problem.inputs.shape and x.dtype == problem.dtype:
            problem = replace(problem, inputs=x)
        return super().backward(problem, dOut, needs)


@bug("a constant of the first call", "makes a constant when it is first needed, and saves it for every backward pass")
class FirstConstant(Layer):
    """Under inference_mode it is nothing that autograd may save."""

    def __init__(self) -> None:
        self.one: Tensor | None = None

    def call(self, problem: Problem) -> Tensor:
        if self.one is None:
            self.one = torch.ones((), dtype=torch.float32)
        return super().call(problem) * self.one.to(problem.dtype)


@bug("B scaled in place and back", "multiplies B by s and divides afterwards", scaling="zero")
class BWritten(Layer):
    """0 · B / 0 is NaN, and a third does not come back."""

    def forward(self, problem: Problem) -> Tensor:
        y = super().forward(problem)
        if problem.lora_B is not None:
            problem.lora_B.detach().mul_(problem.scaling).div_(problem.scaling)
        return y


@bug("dOut gated in place", "multiplies the incoming gradient where it lies", gates="positive")
class DOutWritten(Layer):
    """Another consumer of the same gradient reads garbage."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found = super().backward(problem, dOut, needs)
        if problem.gates is not None:
            dOut.mul_(problem.gates.detach().sum(1, keepdim=True))
        return found


@bug("dX written over x", "reuses the activation's memory in backward")
class XReused(Layer):
    """Right for a caller that never looks at x again."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found = super().backward(problem, dOut, needs)
        if (dX := found["dX"]) is not None and problem.inputs.is_contiguous():
            problem.inputs.detach().copy_(dX)
        return found


def leaving(change: Callable[[], object]) -> Callable[[], Layer]:
    """Global state is changed in a call, and stays so."""

    class Leaving(Layer):
        def call(self, problem: Problem) -> Tensor:
            y = super().call(problem)
            change()
            return y

    return Leaving


_LEFT = "changes global state of torch for its own sake and leaves it so"

default_dtype = bug("default dtype left changed", _LEFT)(leaving(lambda: torch.set_default_dtype(torch.float64)))
seed = bug("seed left changed", _LEFT)(leaving(lambda: torch.manual_seed(0)))
deterministic = bug("deterministic algorithms left on", _LEFT)(
    leaving(lambda: torch.use_deterministic_algorithms(True, warn_only=True))
)
precision = bug("TF32 left allowed", _LEFT)(leaving(lambda: torch.set_float32_matmul_precision("high")))
