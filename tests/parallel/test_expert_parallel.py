"""Experts divided among ranks: every rank's gradients have the bits of one process on the whole batch."""

from __future__ import annotations

import expert_parallel
import pytest
import torch
import world
from parallel_models import TOKENS, Batch, integer_experts, one_process

CASES = pytest.mark.parametrize(
    ("ranks", "num_experts", "routings", "tokens"),
    [
        pytest.param(2, 4, ["any", "any"], [TOKENS, TOKENS], id="even"),
        pytest.param(2, 5, ["any", "one"], [TOKENS, 2], id="uneven slices and counts"),
        pytest.param(2, 3, ["one", "one"], [TOKENS, TOKENS], id="one rank takes all, the other nothing"),
        pytest.param(2, 4, ["last", "any"], [0, TOKENS], id="a rank without tokens"),
        pytest.param(4, 7, ["any", "one", "last", "any"], [TOKENS, 1, 3, 0], id="four ranks"),
    ],
)


@CASES
def test_all_to_all(ranks: int, num_experts: int, routings: list[str], tokens: list[int]) -> None:
    """x and gates have the gradient of their own loss, adapters the mean over ranks: sums exact, n a power of two."""
    batches = [Batch.of(i, num_experts, routings[i], tokens[i]) for i in range(ranks)]
    expected = one_process(integer_experts(num_experts), Batch.joined(batches))
    found = world.run(expert_parallel.step, ranks, "all-to-all", num_experts, routings, tokens)
    for name in ("out", "x", "gates"):
        assert torch.equal(torch.cat([rank[name] for rank in found]), expected[name]), name
        assert expected[name].any()
    for name in expected.keys() - {"out", "x", "gates"}:
        assert expected[name].any()
        for rank in found:
            assert torch.equal(rank[name] * ranks, expected[name]), name


@CASES
def test_sum_over_ranks(ranks: int, num_experts: int, routings: list[str], tokens: list[int]) -> None:
    """Every rank has the gradients of the whole batch, and nobody divides."""
    batches = [Batch.of(i, num_experts, routings[i], tokens[i]) for i in range(ranks)]
    expected = one_process(integer_experts(num_experts), Batch.joined(batches))
    for rank in world.run(expert_parallel.step, ranks, "sum", num_experts, routings, tokens):
        assert rank.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(rank[name], value), name
