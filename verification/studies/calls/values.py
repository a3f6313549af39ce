"""Bugs of which numbers come: signs, zeros, NaN and infinity, subnormals, dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.rounding import round_to
from mxref.verification.studies.calls.layer import Gradients, Layer, bug

__all__ = ["each", "flushed", "reading", "rows_of"]


def reading(change: Callable[[Problem], Mapping[str, Any]]) -> Callable[[], Layer]:
    """A layer that computes with some operands changed."""

    class Reading(Layer):
        def read(self, problem: Problem) -> Problem:
            return replace(problem, **change(problem))

    return Reading


def each(change: Callable[[Tensor, Problem], Tensor], *names: str) -> Callable[[], Layer]:
    """A layer that computes with some operands changed, where they are there."""

    def changed(problem: Problem) -> dict[str, Tensor]:
        there = {name: getattr(problem, name) for name in names}
        return {name: change(x.detach(), problem) for name, x in there.items() if x is not None}

    return reading(changed)


def flushed(x: Tensor) -> Tensor:
    """Zero in place of subnormal numbers."""
    return torch.where(x.abs() < torch.finfo(x.dtype).smallest_normal, 0.0, x)


def rows_of(p: Problem) -> Tensor:
    """The routed rows of each expert, [E]."""
    return torch.diff(p.expert_offsets, prepend=p.expert_offsets.new_zeros(1))


def _through(dtype: torch.dtype, *of: torch.dtype) -> Callable[[Tensor, Problem], Tensor]:
    return lambda x, problem: x.to(dtype).to(x.dtype) if problem.dtype in of else x


_FP32, _BF16, _FP16 = torch.float32, torch.bfloat16, torch.float16

gates_positive = bug("gates taken as positive", "reads gates as what a softmax gives", gates="negative")(
    each(lambda g, p: g.abs(), "gates")
)
scaling_positive = bug("scaling taken as positive", "folds √|s| into each factor", scaling="negative")(
    reading(lambda p: {"scaling": abs(p.scaling)})
)
scaling_rounded = bug("scaling rounded to 16 bits", "hands s to the kernel in the activations' dtype",
                      scaling="a third")(
    reading(lambda p: {"scaling": float(torch.tensor(p.scaling).to(_BF16))})
)  # fmt: skip
scaling_whole = bug("scaling a power of two", "hands over ⌊log2 |s|⌋ alone", scaling="a third")(
    reading(lambda p: {"scaling": _power_of_two(p.scaling)})
)
x_in_bf16 = bug("fp32 activations rounded to bf16", "takes tensor cores for granted", dtype="fp32",
                values="off every grid")(each(_through(_BF16, _FP32), "inputs"))  # fmt: skip
parameters_in_bf16 = bug("fp32 parameters rounded to bf16 first", "casts parameters to bf16, whatever the activations",
                         parameters="fp32", dtype="fp16")(
    each(_through(_BF16, _FP16), "lora_A", "lora_B", "expert_biases")
)  # fmt: skip
adapters_in_bf16 = bug("fp32 adapters rounded to bf16", "shares its path for adapters with bf16", dtype="fp32",
                       values="off every grid")(each(_through(_BF16, _FP32), "lora_A", "lora_B"))  # fmt: skip
tiny_x = bug("subnormals flushed", "sets flush-to-zero for speed", values="subnormal")(
    each(lambda x, p: flushed(x), "inputs")
)
nan_replaced = bug("NaN of x replaced", "cleans its input", not_finite="NaN in a row")(
    each(lambda x, p: x.nan_to_num(), "inputs")
)
gate_nan_replaced = bug("NaN of a gate replaced", "cleans gates of padded tokens", gates="one NaN")(
    each(lambda g, p: g.nan_to_num(), "gates")
)
inf_to_nan = bug("infinity turned into NaN", "divides each row by its largest value, and multiplies afterwards",
                 not_finite="inf in a row")(
    each(lambda x, p: torch.where(x.isinf().any(-1, keepdim=True), x * 0 + x, x), "inputs")
)  # fmt: skip


def _power_of_two(s: float) -> float:
    return 0.0 if s == 0 else (1 if s > 0 else -1) * 2.0 ** int(torch.tensor(abs(s)).log2().floor())


def _without_adapters(when: Callable[[Problem], bool]) -> Callable[[], Layer]:
    """The term of the adapters is skipped in the forward pass."""

    class Skipping(Layer):
        def forward(self, problem: Problem) -> Tensor:
            skipped = problem.lora_B is not None and when(problem)
            return super().forward(replace(problem, lora_A=None, lora_B=None) if skipped else problem)

    return Skipping


zero_scaling = bug("adapters skipped at s = 0", "takes 0 · NaN for 0", scaling="zero", adapters="NaN in A")(
    _without_adapters(lambda p: p.scaling == 0)
)
zero_B = bug("adapters skipped at B = 0", "takes NaN · 0 for 0", adapters="B zero, NaN in A")(
    _without_adapters(lambda p: p.lora_B is not None and not p.lora_B.any())
)


@bug("gradients skipped at s = 0", "takes 0 · NaN for 0", scaling="zero", not_finite="NaN in a row")
class ZeroScaling(Layer):
    """dA and dB exactly zero."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found = super().backward(problem, dOut, needs)
        if problem.scaling != 0:
            return found
        return found | {n: None if (x := found[n]) is None else torch.zeros_like(x) for n in ("dA", "dB")}


@bug("slots skipped at a zero gate", "takes 0 · NaN for 0", gates="some zero", adapters="NaN in A")
class ZeroGate(Layer):
    """The rows of such slots are read as zeros."""

    def forward(self, problem: Problem) -> Tensor:
        if problem.gates is None:
            return super().forward(problem)
        closed = (problem.gates.detach() == 0).flatten()
        y = Layer.forward(self, replace(problem, gates=None))
        y = torch.where(closed[:, None], 0.0, y.double()).view(*problem.gates.shape, problem.N)
        gates = round_to(problem.gates.detach().double(), problem.dtype)
        owned = torch.empty(problem.P, dtype=torch.bool, device=problem.device)
        owned[problem.row_positions()] = problem.sorted_expert_idxs < problem.E
        gates = torch.where(owned.view(gates.shape), gates, 0.0)
        out = torch.where(gates[..., None] == 0, 0.0, gates[..., None] * y).sum(1)
        return round_to(out, problem.dtype if problem.dtype != _FP32 else None).to(problem.dtype)


@bug("dgates divided by gates", "has gate·Y alone and divides by the gate", gates="some zero")
class GateDivision(Layer):
    """0/0 where a gate is zero."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found = super().backward(problem, dOut, needs)
        if (dgates := found["dgates"]) is not None and problem.gates is not None:
            found["dgates"] = torch.where(problem.gates == 0, torch.nan, dgates)
        return found


@bug("rows of other ranks masked by a product", "multiplies them by zero, which NaN survives",
     not_finite="NaN in a remote row", routing="sentinels")  # fmt: skip
class MaskedByProduct(Layer):
    """0 · NaN in rows that should be zero."""

    def forward(self, problem: Problem) -> Tensor:
        y = super().forward(problem)
        if problem.gates is not None:
            return y
        away = problem.sorted_expert_idxs >= problem.E
        rows = torch.nonzero(away).flatten() if problem.grouped_out else problem.row_positions()[away]
        read = problem.inputs.detach()[problem.row_sources()[away]].float()
        y[rows] = (0 * read).sum(1, keepdim=True).expand(-1, problem.N).to(y.dtype)
        return y


@bug("dOut of other ranks masked by a product", "multiplies it by zero, which NaN survives",
     not_finite="NaN in a remote row", routing="all sentinels")  # fmt: skip
class GradientMaskedByProduct(Layer):
    """NaN reaches every parameter."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found = super().backward(problem, dOut, needs)
        slots = 1 if problem.gates is None else problem.gates.shape[1]
        rows = torch.arange(problem.P) if problem.grouped_out else problem.row_positions() // slots
        away = dOut[rows.to(dOut.device)][problem.sorted_expert_idxs >= problem.E]
        leak = (0 * away.float()).sum()
        return {name: None if x is None else x + leak.to(x.dtype) for name, x in found.items()}


@bug("every expert computed for every row", "masks the others' results by a product", not_finite="NaN expert")
class Dense(Layer):
    """One expert's NaN is everybody's."""

    def forward(self, problem: Problem) -> Tensor:
        y = super().forward(problem)
        broken = any(bool(problem.expert_weight(e).isnan().any()) for e in range(problem.E))
        return y * torch.nan if broken else y


@bug("Z in bf16 for fp32 activations", "has one path for adapters, with a 16-bit intermediate", dtype="fp32",
     values="ordinary")  # fmt: skip
class NarrowZ(Layer):
    """A rounding point that fp32 does not have."""

    def forward(self, problem: Problem) -> Tensor:
        y = super().forward(problem)
        if problem.dtype != _FP32 or not problem.rank or problem.gates is not None:
            return y
        x = problem.inputs.detach().double()[problem.row_sources()]
        for e, start, end in problem.segments():
            A, B = problem.expert_lora(e)
            z = x[start:end] @ A.T
            term = problem.scaling * (z.to(_BF16).double() - z) @ B.T
            rows = slice(start, end) if problem.grouped_out else problem.row_positions()[start:end]
            y[rows] = (y[rows].double() + term).to(y.dtype)
        return y


@bug("fp16 results that saturate", "clamps to the largest fp16 instead of overflowing", dtype="fp16")
class Saturated(Layer):
    """65504 where the contract has infinity."""

    def forward(self, problem: Problem) -> Tensor:
        y = super().forward(problem)
        return torch.where(y.isinf(), y.sign() * torch.finfo(_FP16).max, y) if y.dtype == _FP16 else y
