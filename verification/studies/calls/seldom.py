"""Bugs that show where something seldom is asked: one size, one dtype, one byte, or two things that seldom meet."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.verification.studies.calls.layer import Gradients, Layer, bug
from mxref.verification.studies.calls.memory import cached
from mxref.verification.studies.calls.values import each, flushed, reading
from mxref.weights import MXWeights

__all__ = ["turned", "where", "without_adapters"]

_Change = Callable[[Problem], Mapping[str, Any]]


def where(holds: Callable[[Problem], bool], change: _Change) -> Callable[[], Layer]:
    """Some operands are read otherwise in both passes, where something holds."""
    return reading(lambda p: change(p) if holds(p) else {})


def without_adapters(p: Problem) -> Mapping[str, Any]:
    """A change to no adapters."""
    return {"lora_A": None, "lora_B": None}


def turned(name: str) -> _Change:
    """A change of an operand's signs, where it is there."""

    def change(p: Problem) -> Mapping[str, Any]:
        x = getattr(p, name)
        return {} if x is None else {name: -x.detach()}

    return change


_FLUSHED = "casts an operand in a kernel that flushes to zero"

rank_32 = bug("a rank that fills a tile", "masks the rank as if its last tile were never full", rank="thirty two")(
    where(lambda p: p.rank == 32, turned("lora_B"))
)
pairs_of_columns = bug("columns by fours", "stores four columns at once and the rest in none", N="twice an odd number")(
    where(lambda p: p.N % 4 == 2, turned("inputs"))
)
warp_of_experts = bug("experts by warps", "counts a whole warp of experts as none", experts="a warp")(
    where(lambda p: p.E % 32 == 0, turned("inputs"))
)
six_slots = bug("slots for which nothing was compiled", "has kernels for 1 to 4 slots and for 8", slots="six")(
    where(lambda p: p.k == 6, turned("inputs"))
)
eight_gates = bug("gates by eights", "adds eight of a token's rows at once and loses the last", slots="eight",
                  gates="positive")(
    where(lambda p: p.gates is not None and p.gates.shape[1] == 8,
           lambda p: {"gates": p.gates.detach() * (torch.arange(8) < 7)})  # type: ignore[union-attr]
)  # fmt: skip
as_many_columns = bug("experts told from columns by size", "takes the dimension that is E long for the experts",
                      experts="a warp", N="32")(
    where(lambda p: p.N == p.E > 1, turned("inputs"))
)  # fmt: skip
tiny_biases = bug("subnormal biases flushed", _FLUSHED, values="subnormal", biases="there")(
    each(lambda x, p: flushed(x), "expert_biases")
)
tiny_adapters = bug("subnormal B flushed", _FLUSHED, values="subnormal LoRA")(each(lambda x, p: flushed(x), "lora_B"))
blocks_in_a_byte = bug("blocks counted in a byte", "numbers the blocks of a column in eight bits")(
    where(lambda p: p.K > 8192, lambda p: {"inputs": p.inputs.detach() * (torch.arange(p.K) < 8192)})
)
dense_through_bf16 = bug("dense weights through bf16", "stages its tiles in bf16, which MXFP4 weights lose nothing by",
                         weights="dense, off every grid", dtype="fp32")(
    reading(lambda p: {"expert_weights": w.bfloat16().to(p.dtype)} if isinstance(w := p.expert_weights, Tensor) else {})
)  # fmt: skip


def _largest_bytes_lost(p: Problem) -> Mapping[str, Any]:
    weights = p.expert_weights
    assert isinstance(weights, MXWeights)
    return {"expert_weights": replace(weights, scales=weights.scales.clamp(max=251))}


bytes_beside_adapters = bug("large scale bytes beside adapters", "decodes in a kernel of its own where there are some")(
    where(lambda p: bool(p.rank) and isinstance(p.expert_weights, MXWeights), _largest_bytes_lost)
)
least_for_infinity = bug("−∞ of x as the least number", "masks with the dtype's least", not_finite="inf in a row")(
    reading(
        lambda p: {"inputs": torch.where(p.inputs.detach() == -torch.inf, torch.finfo(p.dtype).min, p.inputs.detach())}
    )
)
infinite_gate = bug("an infinite gate as the largest number", "clamps gates to their dtype")(
    where(lambda p: p.gates is not None, lambda p: {"gates": p.gates.detach().nan_to_num(nan=torch.nan)})  # type: ignore[union-attr]
)
skipped_at_zero_A = bug("adapters skipped at A = 0", "takes 0 · ∞ for 0", adapters="A zero", not_finite="inf in a row")(
    where(lambda p: p.lora_A is not None and not p.lora_A.any(), without_adapters)
)
shifted = bug("an int scaling as a shift", "multiplies by 1 << s", scaling="an int")(
    where(lambda p: isinstance(p.scaling, int), lambda p: {"scaling": float(1 << int(p.scaling))})
)
s_in_fp16 = bug("scaling in fp16", "hands powers of two over in fp16", scaling="tiny")(
    reading(
        lambda p: {"scaling": float(torch.tensor(p.scaling, dtype=torch.float64).half())} if abs(p.scaling) < 1 else {}
    )
)
positions_as_ids = bug("positions of the width of ids", "takes the first index tensor's dtype for all",
                       indices="int32, positions int64")(
    where(lambda p: p.sorted_scattered_idxs.element_size() > p.sorted_expert_idxs.element_size() and p.P > 1,
           lambda p: {"sorted_scattered_idxs": p.sorted_scattered_idxs.roll(1)})
)  # fmt: skip
one_run = bug("positions from first to last", "copies an expert's rows at once if the ends are as far apart",
              order_of_positions="shuffled", experts="one")(
    where(lambda p: p.E == 1 and p.P > 0 and int(p.expert_offsets[-1]) == p.P,
           lambda p: {"sorted_scattered_idxs": p.sorted_scattered_idxs.sort().values})
)  # fmt: skip
experts_innermost = bug("experts taken as outermost", "takes a stride of 1 for the columns'",
                        weights="dense", layout_of_weights="innermost")(
    where(lambda p: isinstance(p.expert_weights, Tensor) and p.E > 1 and p.expert_weights.stride(0) == 1,
           turned("expert_weights"))
)  # fmt: skip
fp16_autocast = bug("autocast followed where it is to fp16", "casts as autocast says", autocast="forward pass to fp16")(
    where(lambda p: torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16,
           lambda p: {"inputs": p.inputs.detach().half().to(p.dtype)})
)  # fmt: skip


@bug("dgates in the dtype of A", "makes all gradients of parameters in one dtype", parameters="gates of another")
class OneDtype(Layer):
    """A dtype that is rounded to on the way."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found, A = super().backward(problem, dOut, needs), problem.lora_A
        if A is not None and found["dgates"] is not None:
            found["dgates"] = found["dgates"].to(A.dtype).to(found["dgates"].dtype)
        return found


@bug("dX without V where B is frozen", "asks for V where dB is needed", gradients="dX and dA")
class FrozenB(Layer):
    """The adapter's share of dX is lost."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found = super().backward(problem, dOut, needs)
        if needs["dX"] and needs["dA"] and not needs["dB"]:
            found["dX"] = super().backward(replace(problem, lora_A=None, lora_B=None), dOut, needs)["dX"]
        return found


@bug("a strict deterministic mode refused", "gathers by an operation that has no deterministic form",
     algorithms="strictly deterministic")  # fmt: skip
class NotDeterministic(Layer):
    """Raises where torch would."""

    def read(self, problem: Problem) -> Problem:
        if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError("put_ has no deterministic implementation")
        return problem


@bug("weights known by a weak reference", "keeps no more of the weights than where they are", output="dropped")
class Weak(Layer):
    """The object is gone by the backward pass, as is what its address said."""

    def __init__(self) -> None:
        self.weights: weakref.ref[Any] = weakref.ref(self)

    def call(self, problem: Problem) -> Tensor:
        self.weights = weakref.ref(problem.expert_weights)
        return super().call(problem)

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found = super().backward(problem, dOut, needs)
        if self.weights() is None and found["dX"] is not None:
            found["dX"].zero_()
        return found


@bug("inference mode where nothing needs a gradient", "saves memory in evaluation", gradients="none")
class AsInEvaluation(Layer):
    """What is returned can be written to by nobody, and saved by no graph."""

    def call(self, problem: Problem) -> Tensor:
        if any(isinstance(x, Tensor) and x.requires_grad for x in problem.arguments().values()):
            return super().call(problem)
        with torch.inference_mode():
            return super().call(problem)


scaling_of_A = bug("scaling kept with A", "looks s up by the adapter")(
    cached("scaling", lambda p, s: (p.P, None if p.lora_A is None else p.lora_A.data_ptr()))
)
order_of_rows = bug("input order told by the shape", "keeps what it knows of a call by its shapes")(
    cached("grouped_in", lambda p, order: (p.inputs.shape, p.k, p.E, p.N, p.rank, p.gates is None, p.dtype))
)


@bug("operands handed over in attributes", "keeps the call that it is busy with in itself")
class OneAtATime(Layer):
    """Another thread's call comes between."""

    busy_with: Problem

    def read(self, problem: Problem) -> Problem:
        self.busy_with = problem
        problem.inputs.detach().contiguous()
        return self.busy_with


@bug("results known by their operands", "returns what it has computed for these operands before", gradients="none")
class Replayed(Layer):
    """The caller may have overwritten it."""

    def __init__(self) -> None:
        self.results = dict[tuple[object, ...], Tensor]()

    def call(self, problem: Problem) -> Tensor:
        if torch.is_grad_enabled():
            return super().call(problem)
        key = tuple(repr(x.tolist()) if isinstance(x, Tensor) else repr(x) for x in problem.arguments().values())
        if key not in self.results:
            self.results[key] = super().call(problem)
        return self.results[key]
