"""What is changed in a drawn sample: signs of gates, B zero, what is not finite, index dtypes, the weights' grid."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxref.formats import MX_BLOCK_SIZE
from mxref.verification.cases.call import ONE_ROW, Layout, long_row, window_step
from mxref.verification.cases.case import Case, Sample
from mxref.weights import MXWeights, decode_mxfp4

_TINY = 2.0**-20
"""What is below seems to be zero."""


def as_asked(sample: Sample) -> Sample:
    """The sample with everything that its case asks for beyond a draw; exact sums stay exact."""
    case, problem = sample.case, sample.problem
    operands: dict[str, Any] = {}
    if problem.gates is not None:
        operands["gates"] = _gates(case, problem.gates)
    if problem.lora_A is not None and problem.lora_B is not None:
        operands |= _adapters(case, problem.lora_A, problem.lora_B)
    if case.adapter_values == "zero expert" and problem.expert_biases is not None:
        operands["expert_biases"] = _without(problem.expert_biases, _idle(case), 1)
    if case.nan_bias and problem.expert_biases is not None:
        biases = problem.expert_biases
        operands["expert_biases"] = _with_nan(case, biases, biases.numel() // 2)
    call = case.call
    operands["sorted_expert_idxs"] = problem.sorted_expert_idxs.to(call.index)
    operands["sorted_scattered_idxs"] = problem.sorted_scattered_idxs.to(call.positions or call.index)
    operands["expert_offsets"] = problem.expert_offsets.to(call.offsets or call.index)
    weights = problem.expert_weights
    if isinstance(weights, MXWeights):
        operands["expert_weights"] = replace(weights, orig_dtype=case.quantised_from)
    sample = _not_finite(_overflowing(sample.changed(**operands)))
    weights = sample.problem.expert_weights
    if not isinstance(weights, MXWeights):
        return sample
    if case.dense:
        decoded = decode_mxfp4(weights, problem.dtype).mT
        if case.off_grid_weights:
            decoded = _off_the_grid(decoded, case)
        return sample.changed(expert_weights=_alike(decoded, case.call.weights))
    return sample.changed(expert_weights=weights.repack(case.layout))


def repeated(sample: Sample) -> Sample:
    """The sample with equal rows, or equal everywhere, wherever the call has them lie in memory once."""
    call = sample.case.call
    alike: dict[str, Any] = {
        name: _alike(x, call.layout(name)) for name, x in sample.problem.arguments().items()
        if isinstance(x, Tensor) and x.ndim == 2
    }  # fmt: skip
    return sample.changed(_alike(sample.grad_out, call.dOut), **alike)


def _alike(x: Tensor, layout: Layout) -> Tensor:
    """The first row (or matrix), column or element in place of all, where a layout has it once in memory.

    What overlaps is taken from memory as the rows fill it one after the other.
    """
    if layout == "overlapping" and x.numel():
        return long_row(x).unfold(0, x.shape[1], window_step(x.shape[1])).contiguous()
    x = x[:1].expand(x.shape) if layout in ONE_ROW else x
    return x[:, :1].expand(x.shape) if layout in ("one column", "one number") else x


def _overflowing(sample: Sample) -> Sample:
    """Integers in Z, or in V, times 2^15: one is finite in fp16, two are not. The sums in fp32 stay exact."""
    problem, kind = sample.problem, sample.case.adapter_values
    if kind == "Z overflows" and problem.lora_A is not None:
        return sample.changed(inputs=problem.inputs * 2.0**3, lora_A=problem.lora_A * 2.0**12)
    if kind == "V overflows" and problem.lora_B is not None:
        return sample.changed(sample.grad_out * 2.0**3, lora_B=problem.lora_B * 2.0**12)
    if kind == "s·Z overflows" and problem.lora_A is not None and problem.lora_B is not None:
        A, B = problem.lora_A * 2.0**12, problem.lora_B * 2.0**-8
        return sample.changed(inputs=problem.inputs * 2.0**3, lora_A=A, lora_B=B)
    return sample


def _adapters(case: Case, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    kind, changed = case.adapter_values, dict[str, Tensor]()
    if 0 < abs(case.scaling) < _TINY and not case.narrow:  # who takes it for zero has lost a term
        changed["lora_B"] = B = B / case.scaling
    if kind == "zero A":
        changed["lora_A"] = torch.zeros_like(A)
    if "zero B" in kind or (kind == "zero A" and case.choose("B", False, True)):
        changed["lora_B"] = torch.zeros_like(B)
    if kind == "zero expert":
        changed["lora_A"] = _without(A, (_idle(case) + 1) % case.experts, case.rank)
        changed["lora_B"] = _without(B.mT, _idle(case), case.rank).mT.contiguous()
    if "nan A" in kind:
        row, first, last = A.shape[1], len(A) - case.rank, len(A) - 1
        changed["lora_A"] = _with_nan(case, A, first * row, last * row + 1, last * row + 2)
    if kind == "nan B":
        first, last = B.shape[1] - case.rank, B.shape[1] - 1
        changed["lora_B"] = _with_nan(case, B, first, last, len(B) // 2 * (last + 1) + last)
    return changed


def _idle(case: Case) -> int:
    """The expert whose lora_B is zero where that is one expert's."""
    return case.choose("expert", 0, case.experts // 2, case.experts - 1)


def _without(x: Tensor, expert: int, rows: int) -> Tensor:
    """The same with zero in place of an expert's rows, of which each has so many."""
    return x.index_fill(0, torch.arange(expert * rows, (expert + 1) * rows), 0.0)


def _with_nan(case: Case, x: Tensor, *places: int) -> Tensor:
    """NaN in these places, and infinities of both signs at either end of several numbers of an integer fixture.

    Infinite is a number that is wider than fp16 activations only there. Beside drawn numbers a product of infinity and
    what rounding may make zero would be anything.
    """
    found = x.flatten().clone()
    if x.numel() > 2 and case.exact:
        far = 2.0**17 if (case.dtype, x.dtype) == (torch.float16, torch.float32) else float("inf")
        found[0] = far * case.choose("sign", 1, -1)
        found[-1] = -found[0]
    nans = _nans(case, x.dtype)
    for number, place in enumerate(places):
        _bits_of(found)[place : place + 1] = nans[number % len(nans)]
    return found.view(x.shape)


def _nans(case: Case, dtype: torch.dtype) -> list[int]:
    """Bits of NaN: of those that rounding by adding to the bits, or by cutting them off, makes a number, one or each.

    All but the sign, as a GPU makes it; all; or the lowest one alone, which infinity has not.
    """
    infinity = int(_bits_of(torch.tensor([float("inf")], dtype=dtype)))
    largest = 2 ** (8 * dtype.itemsize - 1) - 1
    return case.choose("NaN", [largest], [-1], [infinity + 1], [largest, -1, infinity + 1])


def _bits_of(x: Tensor) -> Tensor:
    """The same memory as integers."""
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def _off_the_grid(weights: Tensor, case: Case) -> Tensor:
    """Each weight times a number of its own from ½ to 1½, in the weights' dtype."""
    draw = torch.Generator().manual_seed(case.draw_seed(0))
    return (weights * (0.5 + torch.rand(weights.shape, generator=draw, dtype=torch.float64))).to(weights.dtype)


def _gates(case: Case, gates: Tensor) -> Tensor:
    gates = gates * 2.0**case.gate_exponent
    place = torch.arange(gates.numel()).view(gates.shape)
    if case.gate_values == "negative":
        return torch.where(place % 2 == 0, -gates, gates)
    if case.gate_values == "zero":
        return torch.zeros_like(gates)
    if case.gate_values == "one NaN":
        return _with_nan(case, gates, gates.numel() // 2)
    # The middle one is among them: a row of x or dOut that is not finite meets a zero gate there.
    # All of the first token's are, too.
    zero = (place - gates.numel() // 2) % 3 == 0
    if len(gates) > 1:
        zero[0] = True
    return torch.where(zero, 0.0, gates) if case.gate_values == "some zero" else gates


def _not_finite(sample: Sample) -> Sample:
    """NaN or infinity where the case has it; no place is left out where there is none."""
    problem, kind = sample.problem, sample.case.special
    if not kind:
        return sample
    if kind == "nan row, zero dOut":
        return sample.changed(_without_middle(sample), inputs=_not_finite_rows(sample.case, problem.inputs))
    if kind in ("nan row", "inf row"):
        return _beside_zeros(sample.changed(inputs=_not_finite_rows(sample.case, problem.inputs)))
    if kind in ("nan dOut", "inf dOut"):
        return _beside_zeros(sample.changed(_not_finite_rows(sample.case, sample.grad_out)))
    if kind == "nan expert":
        weights = problem.expert_weights
        assert isinstance(weights, MXWeights)
        scales, last = weights.scales.clone(), (problem.K - 1) // MX_BLOCK_SIZE
        expert = sample.case.choose("NaN expert", -1, len(scales) // 2)
        row = sample.case.choose("row", 0, problem.N // 2, problem.N - 1)
        scales[expert, row, sample.case.choose("blocks", [0], [last // 2], [last], [0, last])] = 255
        return sample.changed(expert_weights=MXWeights(weights.packed, scales, weights.K, weights.N))
    return _nan_in_remote_rows(sample) if kind == "nan remote" else sample


def _beside_zeros(sample: Sample) -> Sample:
    """The sample with a block of zeros where the first column of x meets that of dOut: 0 · ∞ is NaN there."""
    weights = sample.problem.expert_weights
    assert isinstance(weights, MXWeights)
    packed = weights.packed.clone()
    packed[:, 0, : MX_BLOCK_SIZE // 2] = 0
    return sample.changed(expert_weights=replace(weights, packed=packed))


def _not_finite_rows(case: Case, x: Tensor) -> Tensor:
    """The middle row NaN; or infinite in one place, since a whole row of infinities would sum to NaN everywhere.

    Where there are several rows the first has one NaN, or a negative infinity.
    """
    x = x.clone()
    middle = x.shape[0] // 2
    if case.special.startswith("nan"):
        _bits_of(x)[0, :1] = _bits_of(x)[middle] = _nans(case, x.dtype)[-1]
        return x
    if middle:
        x[0, :1] = -float("inf")
    x[middle, :1] = float("inf")
    return x


def _without_middle(sample: Sample) -> Tensor:
    """dOut, zero in every row that the middle row of x takes part in."""
    problem, dOut = sample.problem, sample.grad_out.clone()
    read = problem.row_sources() == problem.inputs.shape[0] // 2
    if problem.grouped_out:
        return dOut.masked_fill(read[:, None], 0.0)
    slots = 1 if problem.gates is None else problem.gates.shape[1]
    dOut[problem.row_positions()[read] // slots] = 0.0
    return dOut


def _nan_in_remote_rows(sample: Sample) -> Sample:
    """NaN in every row of x and dOut and in every gate that only sentinels' slots read."""
    problem = sample.problem
    remote = torch.zeros(problem.P, dtype=torch.bool)
    remote[problem.row_positions()] = problem.sorted_expert_idxs >= problem.E

    def only_remote(fan: int, by_expert: bool) -> Tensor:
        if by_expert:
            return problem.sorted_expert_idxs >= problem.E
        return remote.view(-1, fan).all(1)

    x, dOut = problem.inputs.clone(), sample.grad_out.clone()
    x[only_remote(problem.k, problem.grouped_in)] = float("nan")
    slots = 1 if problem.gates is None else problem.gates.shape[1]
    dOut[only_remote(slots, problem.grouped_out)] = float("nan")
    gates = problem.gates
    if gates is not None:
        gates = torch.where(remote.view(gates.shape), float("nan"), gates)
    return sample.changed(dOut, inputs=x, gates=gates)
