"""The public operators beside the differentiable layer, judged by bits on integer fixtures, in buffers of NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mxref.scattermoe import RoundingPoints, backward, forward
from mxref.verification.cases.case import Sample
from mxref.verification.checks.finding import Finding, Status
from mxref.weights import MXWeights, decode_mxfp4

__all__ = ["operators_guard"]


def operators_guard(kernels: ModuleType, sample: Sample) -> list[Finding]:
    """`scatter2scatter_lora_mx` and its dX in every layout, `selective_lora_weights`, `dequantize_experts` of some.

    What does not fit is refused before anything runs.

    Args:
        kernels: a module with these names.
        sample: an integer fixture with packed weights and LoRA, without gates, not grouped.
    """
    findings = [_judge(sample, *check) for check in _checks(kernels, sample)]
    return findings + [_refused(sample, *misuse) for misuse in _misuses(kernels, sample)]


def _checks(kernels: ModuleType, sample: Sample) -> Iterator[tuple[str, Callable[[], Tensor], Tensor]]:
    """What to call each check, the call, and what it must return."""
    problem, points = sample.problem, RoundingPoints.contract(sample.problem.dtype)
    weights, A, B, s, k = problem.expert_weights, problem.lora_A, problem.lora_B, problem.scaling, problem.k
    assert isinstance(weights, MXWeights)
    assert A is not None
    assert B is not None
    fwd = forward(problem, points)
    bwd = backward(problem, fwd, sample.grad_out, points)
    rows = problem.inputs[problem.row_sources()]
    dy = bwd.dy.value.to(problem.dtype)
    idxs, positions, bias = problem.sorted_expert_idxs, problem.sorted_scattered_idxs, problem.expert_biases
    forward_op, backward_op = kernels.scatter2scatter_lora_mx, kernels.scatter2scatter_lora_dX_mx

    for read in (True, False):
        x, fan, dY = (rows, 1, dy) if read else (problem.inputs, k, sample.grad_out)
        for write in (True, False):
            how = f"{_LAYOUT[read]} to {_LAYOUT[write]}"
            operands: tuple[Any, ...] = (x, weights, idxs, positions, fan, A, B, s, bias, read, write)
            yield f"Y, {how}", _into_nan(forward_op, problem.N, *operands), _laid_out(fwd.y.value, positions, write)
            operands = (dY, weights, idxs, positions, 1, A, B, s, read, write)
            yield f"D, {how}", _into_nan(backward_op, problem.K, *operands), _laid_out(bwd.d.value, positions, write)

    def fresh() -> Tensor:
        result: Tensor = forward_op(problem.inputs, weights, idxs, positions, k, A, B, s, bias)
        return result

    yield "Y, a fresh buffer", fresh, _laid_out(fwd.y.value, positions, False)
    E, r = problem.E, problem.rank
    some = torch.arange(E - 1, -1, -2, device=A.device)
    adapters = [(A[e * r : (e + 1) * r], B[:, e * r : (e + 1) * r]) for e in some.tolist()]
    A_some, B_some = torch.cat([A for A, _ in adapters]), torch.cat([B for _, B in adapters], 1)
    yield "A of some experts", lambda: kernels.selective_lora_weights(A, B, some, E)[0], A_some
    yield "B of some experts", lambda: kernels.selective_lora_weights(A, B, some, E)[1], B_some
    decoded = decode_mxfp4(weights, problem.dtype)[some]
    none = some[:0]
    yield "W of no experts", lambda: kernels.dequantize_experts(weights, none, problem.dtype), decoded[:0]
    yield "W of some experts", lambda: _decoded_between_sentinels(kernels, weights, some, problem.dtype), decoded


def _misuses(kernels: ModuleType, sample: Sample) -> Iterator[tuple[str, Callable[[], Tensor], type[Exception]]]:
    """What to call each misuse of the decode, the call, and what it must raise."""
    weights, dtype = sample.problem.expert_weights, sample.problem.dtype
    assert isinstance(weights, MXWeights)
    decode, every = kernels.dequantize_experts, torch.arange(weights.E, device=weights.device)
    shape = (weights.E, weights.N, weights.K)

    def buffer(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=weights.device)

    narrow, turned = buffer(*shape, dtype=torch.int16), buffer(weights.E, weights.K, weights.N).mT
    yield "a dtype that is no float", lambda: decode(weights, every, torch.int16), TypeError
    yield "experts in a matrix", lambda: decode(weights, every[None], dtype), ValueError
    yield "a buffer of another shape", lambda: decode(weights, every, dtype, buffer(*shape[:2], 1)), ValueError
    yield "a buffer of another dtype", lambda: decode(weights, every, dtype, narrow), ValueError
    yield "a buffer that is not contiguous", lambda: decode(weights, every, dtype, turned), ValueError


def _refused(sample: Sample, name: str, call: Callable[[], Tensor], expected: type[Exception]) -> Finding:
    status, reason = Status.FAIL, f"accepted; expected a {expected.__name__}"
    try:
        call()
    except expected:
        status, reason = Status.PASS, f"refused by a {expected.__name__}"
    except Exception as error:  # whatever an operator raises is a finding about it
        reason = f"raised {type(error).__name__}: {error}; expected a {expected.__name__}"
    return Finding("operators", sample.case.name, name, status, reason, 0, 0)


_LAYOUT = {True: "expert order", False: "positions"}


def _decoded_between_sentinels(kernels: ModuleType, weights: MXWeights, some: Tensor, dtype: torch.dtype) -> Tensor:
    """The listed experts' weights, in a list that also holds ids of no expert, whose slots must stay as they are."""
    ids = torch.tensor([-1, *some.tolist(), weights.E], device=some.device)
    out = torch.full((ids.numel(), weights.N, weights.K), float("nan"), dtype=dtype, device=some.device)
    decoded: Tensor = kernels.dequantize_experts(weights, ids, dtype, out)
    if not (decoded[0].isnan().all() and decoded[-1].isnan().all()):
        raise ValueError("a slot that stands for no expert was written")
    return decoded[1:-1]


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


def _laid_out(rows: Tensor, positions: Tensor, grouped: bool) -> Tensor:
    """Rows in expert order, put at their positions unless `grouped`."""
    if grouped:
        return rows
    by_position = torch.empty_like(rows)
    by_position[positions] = rows
    return by_position


def _judge(sample: Sample, name: str, call: Callable[[], Tensor], expected: Tensor) -> Finding:
    def finding(status: Status, reason: str, violations: int = 0) -> Finding:
        return Finding("operators", sample.case.name, name, status, reason, expected.numel(), violations)

    try:
        got = call()
    except Exception as error:  # whatever an operator raises is a finding about it
        return finding(Status.FAIL, f"raised {type(error).__name__}: {error}")
    if got.shape != expected.shape:
        return finding(Status.FAIL, f"has shape {tuple(got.shape)}; expected {tuple(expected.shape)}", expected.numel())
    wrong = int((got.double() != expected.double()).sum())
    if wrong:
        return finding(Status.FAIL, f"{wrong} elements differ from the reference", wrong)
    return finding(Status.PASS, "equal to the reference")
