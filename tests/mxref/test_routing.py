"""Routing: stability, offsets, sentinels, and the renumbering of active experts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mxref import flatten_sort_count, get_active_experts, remap_expert_indices


@st.composite
def choices(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Router choices [M, k] with sentinels on both sides of the valid range, M = 0 among them."""
    E, M, k = draw(st.integers(1, 9)), draw(st.integers(0, 20)), draw(st.integers(1, 8))
    ids = draw(st.lists(st.integers(-2, E + 1), min_size=M * k, max_size=M * k))
    return torch.tensor(ids, dtype=torch.int64).view(M, k), E


@given(choices())
def test_rows_are_sorted_stably_and_offsets_count_owned_rows(case: tuple[torch.Tensor, int]) -> None:
    ids, E = case
    experts, positions, offsets = flatten_sort_count(ids, E)
    flat = [e if 0 <= e < E else E for e in ids.flatten().tolist()]
    expected = sorted(range(len(flat)), key=lambda position: (flat[position], position))
    assert positions.tolist() == expected
    assert experts.tolist() == [flat[position] for position in expected]
    assert offsets.tolist() == [sum(e <= last for e in flat) for last in range(E)]


@given(choices())
def test_remapping_keeps_order_and_drops_experts_without_rows(case: tuple[torch.Tensor, int]) -> None:
    ids, E = case
    experts, _, offsets = flatten_sort_count(ids, E)
    active = get_active_experts(experts, E)
    assert active.tolist() == sorted({e for e in experts.tolist() if e < E})
    remapped, compact = remap_expert_indices(experts, offsets, active, E)
    names = [*active.tolist(), E]
    assert [names[row] for row in remapped.tolist()] == experts.tolist()
    assert compact.tolist() == [sum(e <= last for e in experts.tolist()) for last in active.tolist()]


def test_wrong_choices_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="expert_idxs"):
        flatten_sort_count(torch.zeros(3, 2), 4)
    with pytest.raises(ValueError, match=r"\[tokens, top_k\]"):
        flatten_sort_count(torch.zeros(3, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="num_experts"):
        flatten_sort_count(torch.zeros(3, 2, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="expert_offsets"):
        remap_expert_indices(torch.zeros(1), torch.zeros(2), torch.zeros(1), 3)
