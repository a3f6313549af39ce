"""Experts divided among ranks: every rank's gradients have the bits of one process on the whole batch."""

from __future__ import annotations

import expert_parallel
import pytest
import torch
import world
from parallel_models import TOKENS, Batch, integer_experts, one_process

from mxref.kernels.parallel.experts import _in_order

CASES = {
    "even": (4, ["any", "any"], [TOKENS, TOKENS]),
    "uneven slices and counts": (5, ["any", "one"], [TOKENS, 2]),
    "one rank takes all, the other nothing": (3, ["one", "one"], [TOKENS, TOKENS]),
    "a rank without tokens": (4, ["last", "any"], [0, TOKENS]),
    "four ranks": (7, ["any", "one", "last", "any"], [TOKENS, 1, 3, 0]),
}
"""Number of experts, and for each rank where its tokens go and how many there are."""

RANKS = pytest.mark.parametrize("ranks", [2, 4])


def _expected(num_experts: int, routings: list[str], tokens: list[int]) -> dict[str, torch.Tensor]:
    batches = [Batch.of(i, num_experts, routings[i], tokens[i]) for i in range(len(tokens))]
    found = one_process(integer_experts(num_experts), Batch.joined(batches))
    assert all(value.any() for value in found.values())
    return found


@RANKS
def test_all_to_all(ranks: int) -> None:
    """x and gates have the gradient of their own loss, adapters the mean over ranks: sums exact, n a power of two."""
    cases = {name: case for name, case in CASES.items() if len(case[2]) == ranks}
    found = world.run(expert_parallel.steps, ranks, "all-to-all", list(cases.values()))
    for (case, arguments), *runs in zip(cases.items(), *found, strict=True):
        expected = _expected(*arguments)
        for name in ("out", "x", "gates"):
            assert torch.equal(torch.cat([run[name] for run in runs]), expected[name]), (case, name)
        for name in expected.keys() - {"out", "x", "gates"}:
            for run in runs:
                assert torch.equal(run[name] * ranks, expected[name]), (case, name)


def test_gradients_lie_in_order() -> None:
    """Those of a single expert too, whose stride of the experts may be anything: torch 2.11 would gather to copy it."""
    gradient = torch.arange(8.0).as_strided((1, 4, 2), (2, 2, 1))
    found = _in_order(gradient)
    assert gradient.is_contiguous()
    assert found.stride() == (8, 2, 1)
    assert torch.equal(found, gradient)
    across = torch.arange(24.0).view(2, 3, 4).transpose(1, 2)
    assert _in_order(across).stride() == (12, 3, 1)
    assert torch.equal(_in_order(across), across)


@RANKS
def test_sum_over_ranks(ranks: int) -> None:
    """Every rank has the gradients of the whole batch, and nobody divides."""
    cases = {name: case for name, case in CASES.items() if len(case[2]) == ranks}
    found = world.run(expert_parallel.steps, ranks, "sum", list(cases.values()))
    for (case, arguments), *runs in zip(cases.items(), *found, strict=True):
        expected = _expected(*arguments)
        for run in runs:
            assert run.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(run[name], value), (case, name)
