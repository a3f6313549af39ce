"""Ways to ask this project's own kernels, beyond what any candidate is asked.

Their public operators and tables, indices out of range that nobody checked, and memory and arithmetic that are watched
while they run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.scattermoe import RoundingPoints, backward, forward
from mxref.verification.candidates.answer import Answer, Outputs, answered
from mxref.verification.candidates.asking import by_its_decoder, once
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.memory import FreshRedZones, RedZone, between_red_zones
from mxref.verification.candidates.own.guard_pages import GuardPages
from mxref.verification.candidates.own.interpreted import INDEX_LIMIT, checked_indices, checked_memory
from mxref.verification.cases.case import Sample
from mxref.verification.cases.own.out_of_range import offsets_out_of_range, positions_out_of_range
from mxref.verification.cases.own.tables import TableSample
from mxref.weights import MXWeights


def by_operators(candidate: Candidate, sample: Sample) -> list[Answer]:
    """`scatter2scatter_lora_mx` and its dX in every layout into buffers of NaN, and the operators on some experts.

    Args:
        candidate: this project's kernels.
        sample: an integer fixture with packed weights and LoRA, without gates, not grouped.

    Returns:
        Answers with the one output "out", labelled as in `checks.operators`.
    """
    kernels, problem = _kernels(candidate), sample.problem
    weights, A, B, s, k = problem.expert_weights, problem.lora_A, problem.lora_B, problem.scaling, problem.k
    assert isinstance(weights, MXWeights)
    assert A is not None
    assert B is not None
    fwd = forward(problem, RoundingPoints.contract(problem.dtype))
    dy = backward(problem, fwd, sample.grad_out, RoundingPoints.contract(problem.dtype)).dy.value.to(problem.dtype)
    rows = problem.inputs[problem.row_sources()]
    idxs, positions, bias = problem.sorted_expert_idxs, problem.sorted_scattered_idxs, problem.expert_biases
    forward_op, backward_op = kernels.scatter2scatter_lora_mx, kernels.scatter2scatter_lora_dX_mx
    layout = {True: "expert order", False: "positions"}
    calls: dict[str, Callable[[], Tensor]] = {}
    for read in (True, False):
        x, fan, dY = (rows, 1, dy) if read else (problem.inputs, k, sample.grad_out)
        for write in (True, False):
            how = f"{layout[read]} to {layout[write]}"
            operands: tuple[Any, ...] = (x, weights, idxs, positions, fan, A, B, s, bias, read, write)
            calls[f"Y, {how}"] = _into_nan(forward_op, problem.N, *operands)
            operands = (dY, weights, idxs, positions, 1, A, B, s, read, write)
            calls[f"D, {how}"] = _into_nan(backward_op, problem.K, *operands)
    some = torch.arange(problem.E - 1, -1, -2, device=A.device)
    calls |= {
        "Y, a fresh buffer": lambda: forward_op(problem.inputs, weights, idxs, positions, k, A, B, s, bias),
        "A of some experts": lambda: kernels.selective_lora_weights(A, B, some, problem.E)[0],
        "B of some experts": lambda: kernels.selective_lora_weights(A, B, some, problem.E)[1],
        "W of no experts": lambda: kernels.dequantize_experts(weights, some[:0], problem.dtype),
        "W of some experts": lambda: _decoded_behind_sentinels(kernels, weights, some, problem.dtype),
    }
    return [answered(partial(_watching, sample, partial(_as_output, call)), label) for label, call in calls.items()]


def with_bad_arguments(candidate: Candidate, sample: Sample) -> list[Answer]:
    """Misuses of the decode, labelled as in `checks.operators`; each should raise."""
    weights, dtype = sample.problem.expert_weights, sample.problem.dtype
    assert isinstance(weights, MXWeights)
    decode, every = _kernels(candidate).dequantize_experts, torch.arange(weights.E, device=weights.device)
    shape = (weights.E, weights.N, weights.K)

    def buffer(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=weights.device)

    narrow, turned = buffer(*shape, dtype=torch.int16), buffer(weights.E, weights.K, weights.N).mT
    calls: dict[str, Callable[[], Tensor]] = {
        "a dtype that is no float": lambda: decode(weights, every, torch.int16),
        "experts in a matrix": lambda: decode(weights, every[None], dtype),
        "a buffer of another shape": lambda: decode(weights, every, dtype, buffer(*shape[:2], 1)),
        "a buffer of another dtype": lambda: decode(weights, every, dtype, narrow),
        "a buffer that is not contiguous": lambda: decode(weights, every, dtype, turned),
    }
    return [answered(partial(_as_output, call), label) for label, call in calls.items()]


def for_tables(candidate: Candidate, sample: TableSample) -> list[Answer]:
    """The kernels' own tables of a routing: tiles for each height, twice, and the row at each position."""
    case = sample.case
    with FreshRedZones() as fresh:
        offsets = RedZone(torch.tensor(case.offsets, device=sample.device), case.P + 1)
        positions = RedZone(case.positions().to(sample.device), case.P)
        routing = _kernels(candidate).device.schedule.Routing(positions.inside, offsets.inside)

        def tables() -> Outputs:
            found = {f"{h} rows a tile{again}": routing.tiles(h) for again in ("", ", again") for h in case.heights}
            return found | ({"row at each position": routing.inverse()} if case.known else {})

        answer = answered(tables)
    return [replace(answer, written=(fresh.written(),))]


def with_indices_out_of_range(candidate: Candidate, sample: Sample) -> list[Answer]:
    """Positions, or offsets where the sample has empty experts, out of range and unchecked, as on a GPU."""
    if sample.case.routing == "empty_experts":
        return [
            _between_red_zones(candidate, bad, f"{sample.case.name}, {name}", {})
            for name, bad in offsets_out_of_range(sample).items()
        ]
    bad, kept = positions_out_of_range(sample)
    answer = _between_red_zones(candidate, bad, "", {"Y": kept})
    return [replace(answer, outputs={"Y": answer.outputs.get("Y")} if answer.error is None else {})]


def between_fresh_red_zones(candidate: Candidate, sample: Sample) -> list[Answer]:
    """A run whose operands, and whatever it allocates, lie between red zones; and a decode likewise."""
    inside, _ = between_red_zones(sample)
    answers = []
    for ask, label in ((once, ""), (by_its_decoder, "decode")):
        with FreshRedZones() as fresh:
            asked = ask(candidate, inside)
        answers += [replace(answer, label=label, written=(fresh.written(),)) for answer in asked]
    return answers


def at_guard_pages(candidate: Candidate, sample: Sample) -> list[Answer]:
    """A run on a GPU whose every operand and allocation ends at a guard page."""
    pages = GuardPages(sample.problem.device)

    def run() -> Outputs:
        moved = pages.sample(sample)
        with pages:
            outputs = candidate.run(moved)
        return {tensor: None if x is None else x.clone() for tensor, x in outputs.items()}

    answer = answered(run)
    pages.release()
    return [answer]


def with_watched_memory(candidate: Candidate, sample: Sample) -> list[Answer]:
    """An interpreted run whose every load and store is watched; "addresses" says how many there were."""

    def run() -> Outputs:
        with FreshRedZones(), checked_memory() as touched:
            candidate.run(sample)
        return {"addresses": torch.tensor(touched.count)}

    return [answered(run)]


def with_watched_indices(candidate: Candidate, sample: Sample) -> list[Answer]:
    """An interpreted run without 32-bit sums and products beyond INDEX_LIMIT.

    Where rows times rank go beyond it, the forward pass alone: dA and dB loop over rows, and a loop's variable is
    Python's here, not the 64-bit one that it is on a GPU. What stays small by contract may have 32 bits: a size, an
    element of one matrix.
    """
    run = candidate.trace if sample.problem.P * sample.problem.rank > INDEX_LIMIT else candidate.run
    return [_with_watched_indices(lambda: run(sample))]


def with_watched_indices_of_the_decoder(candidate: Candidate, sample: Sample) -> list[Answer]:
    """The same for the candidate's own decoder."""
    return [_with_watched_indices(lambda: _raising(by_its_decoder(candidate, sample)))]


def _as_output(call: Callable[[], Tensor]) -> Outputs:
    return {"out": call()}


def _with_watched_indices(call: Callable[[], object]) -> Answer:
    def run() -> Outputs:
        with checked_indices():
            call()
        return {}

    return answered(run)


def _raising(answers: list[Answer]) -> None:
    for answer in answers:
        if answer.error is not None:
            raise answer.error


def _between_red_zones(candidate: Candidate, sample: Sample, label: str, rows: dict[str, Tensor]) -> Answer:
    """An unchecked run between red zones; interpreted, every access outside a tensor raises."""
    inside, _ = between_red_zones(sample)
    unchecked = patch.object(Problem, "validate", lambda self, check_values: None)
    with unchecked, FreshRedZones() as fresh:
        answer = answered(lambda: _watching(sample, lambda: candidate.run(inside)), label)
    return replace(answer, rows=rows, written=(fresh.written(),))


def _watching(sample: Sample, call: Callable[[], Outputs]) -> Outputs:
    """What the call gives; interpreted, an access outside every tensor raises, where it would end this process."""
    with checked_memory() if sample.problem.device.type == "cpu" else nullcontext():
        return call()


def _kernels(candidate: Candidate) -> ModuleType:
    assert candidate.operators is not None
    return candidate.operators


def _decoded_behind_sentinels(kernels: ModuleType, weights: MXWeights, some: Tensor, dtype: torch.dtype) -> Tensor:
    """The listed experts' weights, behind ids of no expert, whose slots must stay as they are."""
    ids = torch.tensor([-1, weights.E, *some.tolist()], device=some.device)
    out = torch.full((ids.numel(), weights.N, weights.K), float("nan"), dtype=dtype, device=some.device)
    decoded: Tensor = kernels.dequantize_experts(weights, ids, dtype, out)
    if not decoded[:2].isnan().all():
        raise ValueError("a slot that stands for no expert was written")
    return decoded[2:]


def _into_nan(operator: Callable[..., Tensor], columns: int, x: Tensor, *arguments: Any) -> Callable[[], Tensor]:
    """The operator's call into a buffer of NaN, one row a routed row; what it returns must be that buffer."""
    idxs = arguments[1]

    def call() -> Tensor:
        out = x.new_full((idxs.numel(), columns), float("nan"))
        returned = operator(x, *arguments, out=out)
        if returned.data_ptr() != out.data_ptr():
            raise ValueError("the result is not the buffer given as out")
        return returned

    return call
