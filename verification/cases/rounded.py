"""Integers whose sums are exact in any order, and whose results 16 bits have to round.

Z, Y, dY, V, D and all gradients are integers, or halves, with more bits than bf16 or fp16 has, often half way between
two numbers. fp32 holds every partial sum, so that each rounding point of the contract decides bits: one that is left
out, comes twice or rounds ties another way shows, in whatever circumstance that happens. In fp32 nothing is rounded,
and x or dOut has more bits than TF32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mxref.scattermoe import Rounded, RoundingPoints
from mxref.verification.cases.call import REPEATED
from mxref.verification.cases.case import Case, Sample
from mxref.verification.cases.gauge import spread_out
from mxref.verification.cases.integer import (
    at_most,
    dealt,
    draw_integer,
    keeps_sums_exact,
    problem_of_integers,
    random_codes,
    rounding_points,
)
from mxref.verification.cases.special import repeated
from mxref.weights import MXWeights


@dataclass(frozen=True)
class _Largest:
    """The largest magnitude of each operand."""

    x: int
    dOut: int
    A: int
    B: int
    gates: int


_SMALL = (_Largest(31, 31, 2, 2, 3), _Largest(15, 15, 2, 2, 3), _Largest(7, 7, 1, 1, 2))
_BF16 = (_Largest(255, 255, 7, 7, 15), _Largest(127, 255, 3, 3, 7), _Largest(63, 127, 3, 3, 7), *_SMALL)
_FP16_FORWARD = (_Largest(255, 3, 7, 1, 3), _Largest(255, 1, 7, 1, 1), _Largest(255, 1, 3, 1, 1), *_SMALL)
_FP16_BACKWARD = (_Largest(3, 255, 1, 7, 15), _Largest(1, 255, 1, 7, 15), _Largest(1, 255, 1, 3, 7), *_SMALL)
_FP32_FORWARD = tuple(replace(each, x=4095) for each in _FP16_FORWARD[:3])
_FP32_BACKWARD = tuple(replace(each, dOut=4095) for each in _FP16_BACKWARD[:3])
"""Each is tried, until fp32 holds every sum and the activation dtype every result. fp16 has room for many bits in one
pass alone, and so has fp32 for more than TF32 holds."""

_MOST_EXPERTS, _FEWEST_TOKENS = 20, 5
_BIAS = 64
_NONZEROS = 16
"""In a row of x; dOut has a quarter. A column of lora_A and a row of lora_B have as many in each expert as dOut."""
_EXACT = 2.0**24 / 1.02
"""Units that the magnitudes of a sum's terms may have together; the rounding of the terms adds less than the rest."""
_UNIT = 0.5
"""Of weights under the scale byte of 2^0."""
_NO_SIGNS = 0x77
_FINITE = 60_000.0
"""What fp16 holds."""


def rounded(case: Case) -> Case:
    """A case with such numbers in place of its own, where nothing keeps a wrong result from being seen.

    There are rows, and experts have some; all gradients are asked for; numbers are finite; factors are powers of two,
    not zero; no operand is repeated. There are not more than `_MOST_EXPERTS`, most of which would be idle. Of every two
    cases one has a row of x a token, whose rows several slots read.
    """
    by_token: dict[str, Any] = {"grouped_in": False, "fan_out": None} if case.choose("order", True, False) else {}
    scaling = case.scaling if case.scaling and keeps_sums_exact(case.scaling) else 0.5
    call = case.call
    x, A, B, dOut = ("contiguous" if layout in REPEATED else layout for layout in (call.x, call.A, call.B, call.dOut))
    biases, gates = ("contiguous" if layout == "overlapping" else layout for layout in (call.biases, call.gates))
    return replace(
        case,
        name=f"{case.name}, rounded",
        data="rounded",
        experts=min(case.experts, _MOST_EXPERTS),
        tokens=_several(case.tokens),
        routing="sentinels" if case.routing == "all_sentinels" else case.routing,
        scaling=scaling,
        special="",
        nan_bias=False,
        off_grid_weights=False,
        gate_exponent=0,
        gate_values="positive" if case.gate_values == "one NaN" else case.gate_values,
        adapter_values="zero A" if case.adapter_values == "zero A" else "ordinary",
        call=replace(call, x=x, A=A, B=B, biases=biases, gates=gates, dOut=dOut, needs=None, mode="grad"),
        covers=(),
        **by_token,
    )


def _several(tokens: int) -> int:
    """Tokens, one where there is one; gates that divide as many rows divide these too."""
    if tokens == 1:
        return 1
    return tokens * -(-_FEWEST_TOKENS // tokens) if tokens else _FEWEST_TOKENS


def draw_rounded(case: Case, seed: int) -> Sample:
    """Draw, on the CPU, until fp32 holds every sum; the case's plain integers (`draw_integer`) where none does."""
    draw = torch.Generator().manual_seed(case.draw_seed(seed))
    forward = bool(torch.randint(0, 2, (), generator=draw))
    tried = {
        torch.float32: _FP32_FORWARD if forward else _FP32_BACKWARD,
        torch.bfloat16: _BF16,
        torch.float16: _FP16_FORWARD if forward else _FP16_BACKWARD,
    }
    for largest in tried[case.dtype]:
        sample = repeated(_draw(case, draw, largest))
        if not _sums_are_exact(sample):
            continue
        sample = repeated(spread_out(sample, draw, *((1, 1) if case.narrow else (8, 4))))
        if _is_finite(sample):
            return _beside_the_grid(sample)
    return draw_integer(case, seed)


def _beside_the_grid(sample: Sample) -> Sample:
    """Adapters wider than activations a little larger than what they are rounded to."""
    adapters = {name: getattr(sample.problem, name) for name in ("lora_A", "lora_B")}
    wider = {name: x * (1 + 2**-13) for name, x in adapters.items() if x is not None and x.dtype == torch.float32}
    return sample.changed(**wider) if sample.case.dtype != torch.float32 else sample


def _draw(case: Case, draw: torch.Generator, largest: _Largest) -> Sample:
    E, K, N, r, own = case.experts, case.K, case.N, case.rank, case.dtypes
    few = _NONZEROS // 4
    lora_A = lora_B = bias = gates = None
    if r:
        A = at_most(few, E, r, K, draw) * _up_to(largest.A, (E, r, K), draw)
        B = at_most(few, E, r, N, draw) * _up_to(largest.B, (E, r, N), draw)
        lora_A, lora_B = A.flatten(0, 1).to(own["lora_A"]), B.permute(2, 0, 1).flatten(1).to(own["lora_B"])
    if case.bias:
        bias = (_up_to(2 * _BIAS, (E, N), draw) - _BIAS).to(own["expert_biases"])
    if case.gate_slots:
        gates = _up_to(largest.gates, (case.rows // case.gate_slots, case.gate_slots), draw).to(own["gates"])
    x = _sparse(case.input_rows, K, _NONZEROS, largest.x, draw)
    problem = problem_of_integers(case, draw, x, random_codes(case, draw), lora_A, lora_B, bias, gates)
    return Sample(case, problem, _sparse(*case.output_shape, few, largest.dOut, draw).to(case.dtype))


def _up_to(largest: int, shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    return torch.randint(1, largest + 1, shape, generator=draw)


def _sparse(rows: int, columns: int, nonzeros: int, largest: int, draw: torch.Generator) -> Tensor:
    """So many integers a row, the columns dealt like cards: fp64 [rows, columns]."""
    return dealt(rows, columns, min(nonzeros, columns), 1, draw) * _up_to(largest, (rows, columns), draw)


def _sums_are_exact(sample: Sample) -> bool:
    """Whether fp32 holds the sum of the magnitudes of every sum's terms."""
    problem = sample.problem
    assert isinstance(problem.expert_weights, MXWeights)
    operands: dict[str, Any] = {name: x.abs() for name, x in problem.arguments().items() if _is_summed(x)}
    weights = replace(problem.expert_weights, packed=problem.expert_weights.packed & _NO_SIGNS)
    magnitudes = replace(problem, **operands, expert_weights=weights, scaling=abs(problem.scaling))
    sums = rounding_points(magnitudes, sample.grad_out.abs(), RoundingPoints.exact())
    largest = max(map(_most, sums.values()))
    return largest <= _EXACT * min(_UNIT, abs(problem.scaling) or 1.0)


def _is_summed(operand: Any) -> bool:
    return isinstance(operand, Tensor) and operand.is_floating_point()


def _is_finite(sample: Sample) -> bool:
    """Whether fp16, if it is the activation dtype, holds every result."""
    if sample.case.dtype != torch.float16:
        return True
    points = rounding_points(sample.problem, sample.grad_out, RoundingPoints.contract(torch.float16))
    return all(_most(point) <= _FINITE for point in points.values())


def _most(point: Rounded) -> float:
    return float(point.exact.abs().max()) if point.exact.numel() else 0.0
