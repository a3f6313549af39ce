"""What is changed in a drawn sample: signs of gates, B zero, numbers that are not finite, index dtypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxref.formats import MX_BLOCK_SIZE
from mxref.verification.cases.case import Case, Sample
from mxref.weights import MXWeights, decode_mxfp4


def as_asked(sample: Sample) -> Sample:
    """The sample with everything that its case asks for beyond a draw; exact sums stay exact."""
    case, problem = sample.case, sample.problem
    operands: dict[str, Any] = {}
    if problem.gates is not None:
        operands["gates"] = _gates(case, problem.gates)
    if case.zero_B and problem.lora_B is not None:
        operands["lora_B"] = torch.zeros_like(problem.lora_B)
    for name in ("sorted_expert_idxs", "sorted_scattered_idxs", "expert_offsets"):
        operands[name] = getattr(problem, name).to(case.call.index)
    sample = _not_finite(sample.changed(**operands))
    weights = sample.problem.expert_weights
    if case.dense and isinstance(weights, MXWeights):
        sample = sample.changed(expert_weights=decode_mxfp4(weights, problem.dtype).mT)
    return sample


def _gates(case: Case, gates: Tensor) -> Tensor:
    gates = gates * 2.0**case.gate_exponent
    place = torch.arange(gates.numel()).view(gates.shape)
    if case.gate_values == "negative":
        return torch.where(place % 2 == 0, -gates, gates)
    # The middle one is among them: a row of x or dOut that is not finite meets a zero gate there.
    zero = (place - gates.numel() // 2) % 3 == 0
    return torch.where(zero, 0.0, gates) if case.gate_values == "some zero" else gates


def _not_finite(sample: Sample) -> Sample:
    """NaN or infinity where the case has it; no place is left out where there is none."""
    problem, kind = sample.problem, sample.case.special
    if not kind:
        return sample
    if kind in ("nan row", "inf row"):
        x = problem.inputs.clone()
        row = x[x.shape[0] // 2]  # a whole row of infinities would sum to NaN everywhere
        (row if kind == "nan row" else row[:1]).fill_(float("nan" if kind == "nan row" else "inf"))
        return sample.changed(inputs=x)
    if kind == "nan dOut":
        dOut = sample.grad_out.clone()
        dOut[dOut.shape[0] // 2] = float("nan")
        return sample.changed(dOut)
    if kind == "nan gate" and problem.gates is not None:
        gates = problem.gates.clone()
        gates.view(-1)[gates.numel() // 2] = float("nan")
        return sample.changed(gates=gates)
    if kind == "nan A" and problem.lora_A is not None:
        A = problem.lora_A.clone()
        A[-1, 0] = float("nan")
        return sample.changed(lora_A=A)
    if kind == "nan expert":
        weights = problem.expert_weights
        assert isinstance(weights, MXWeights)
        scales = weights.scales.clone()
        scales[-1, -1, (problem.K - 1) // MX_BLOCK_SIZE] = 255
        return sample.changed(expert_weights=MXWeights(weights.packed, scales, weights.K, weights.N))
    return _nan_in_remote_rows(sample) if kind == "nan remote" else sample


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
