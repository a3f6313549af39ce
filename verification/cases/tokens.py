"""Tokens of a sample: the rows of each, the sample with other values for some, and the sample of a few alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxref.routing import flatten_sort_count
from mxref.verification.cases.case import Sample


def tokens_of(sample: Sample) -> dict[str, Tensor]:
    """The token of each row of Y (and dOut), dX (and x) and dgates: int64 [rows], by tensor."""
    problem, top_k, slots = sample.problem, sample.case.top_k, sample.case.gate_slots
    by_expert = problem.row_positions() // top_k

    def every(fan: int) -> Tensor:
        return torch.arange(0, problem.P, fan, device=problem.device) // top_k

    tokens = {"Y": by_expert if problem.grouped_out else every(slots or 1)}
    tokens["dX"] = by_expert if problem.grouped_in else every(problem.k)
    return tokens | ({"dgates": every(slots)} if slots else {})


def disturbed(sample: Sample, tokens: Tensor) -> Sample:
    """The sample with other values, a thousand times as large, in the rows of some tokens; their gates are negative."""
    of, problem = tokens_of(sample), sample.problem

    def changed(x: Tensor, tensor: str, factor: float) -> Tensor:
        return torch.where(torch.isin(of[tensor], tokens)[:, None], x * factor, x)

    gates = None if problem.gates is None else changed(problem.gates, "dgates", -0.5)
    return sample.changed(
        changed(sample.grad_out, "Y", -1024.0), inputs=changed(problem.inputs, "dX", -1024.0), gates=gates
    )


def select(sample: Sample, tensor: str, rows: Tensor, keep: Tensor) -> Tensor:
    """The kept tokens' rows of Y, dX or dgates, in the order that a call on these tokens alone has them."""
    problem = sample.problem
    in_expert_order = {"Y": problem.grouped_out, "dX": problem.grouped_in}.get(tensor, False)
    if not in_expert_order:
        return rows[torch.isin(tokens_of(sample)[tensor], keep)]
    positions, (_, order, _) = _routing(sample, keep)
    by_position = torch.empty_like(rows)
    by_position[problem.row_positions()] = rows
    return by_position[positions][order.long()]


def without(sample: Sample, keep: Tensor) -> Sample:
    """The sample of the kept tokens alone."""
    problem = sample.problem
    experts, order, offsets = _routing(sample, keep)[1]
    part = sample.changed(
        select(sample, "Y", sample.grad_out, keep),
        inputs=select(sample, "dX", problem.inputs, keep),
        sorted_expert_idxs=experts,
        sorted_scattered_idxs=order,
        expert_offsets=offsets,
        gates=None if problem.gates is None else select(sample, "dgates", problem.gates, keep),
    )
    return replace(part, case=replace(sample.case, tokens=keep.numel()))


def _routing(sample: Sample, keep: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Positions of the kept tokens, and the routing of these tokens alone."""
    problem, top_k = sample.problem, sample.case.top_k
    positions = (keep[:, None] * top_k + torch.arange(top_k, device=keep.device)).flatten()
    experts = torch.empty_like(problem.sorted_expert_idxs)
    experts[problem.row_positions()] = problem.sorted_expert_idxs
    return positions, flatten_sort_count(experts[positions].view(-1, top_k), problem.E)
