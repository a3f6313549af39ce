"""Where operands lie in memory: the same values in other places."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mxref.verification.cases.call import Call, Layout, lay_out


@pytest.mark.parametrize(
    "layout",
    [
        "contiguous", "transposed", "sliced", "padded", "offset", "apart", "innermost", "overlapping", "expanded",
        "one column", "one number",
    ],
)  # fmt: skip
@pytest.mark.parametrize("before", [0, 64])
def test_layouts_hold_the_same_values_in_other_places(layout: Layout, before: int) -> None:
    alike = {
        "expanded": torch.arange(4.0).expand(3, 4), "one column": torch.arange(3.0)[:, None].expand(3, 4),
        "one number": torch.tensor(2.0).expand(3, 4), "overlapping": torch.arange(8.0).unfold(0, 4, 2),
    }  # fmt: skip
    x = alike.get(layout, torch.arange(12.0).view(3, 4)).contiguous()
    laid = lay_out(x, layout, before)
    assert torch.equal(laid, x)
    assert laid.data_ptr() != x.data_ptr()
    if layout not in ("transposed", "padded"):
        behind = laid.storage_offset() - before
        assert behind in (13, 8, 4, 2, 16) if layout == "offset" else behind == (4 if layout == "apart" else 0)
    found = {
        "contiguous": laid.is_contiguous(),
        "transposed": laid.stride() in ((1, 3), (1, 10), (1, 16)),
        "innermost": laid.stride() == (1, 3),
        "sliced": laid.stride() in ((8, 2), (21, 3)),
        "padded": laid.stride() in ((9, 1), (16, 1)),
        "one column": laid.stride() == (1, 0),
        "one number": laid.stride() == (0, 0),
        "offset": laid.is_contiguous(),
        "apart": laid.stride() == (8, 1),
        "overlapping": laid.stride() == (2, 1),
        "expanded": laid.stride() == (0, 1),
    }
    assert found[layout]


def test_a_layout_is_had_in_each_of_its_ways() -> None:
    """As fused projections lie: either half, with wide rows; and with neither rows nor columns close together."""
    ways: dict[Layout, Callable[[int], list[tuple[int, ...]]]] = {
        "transposed": lambda r: [
            (5 * r, 1, r, 0),
            (10 * r, 1, r, 5 * r),
            (5 * (r + 7), 1, r + 7, 0),
            (5 * (r // 16 + 1) * 16, 1, (r // 16 + 1) * 16, 0),
        ],
        "sliced": lambda r: [(10 * r, 10, 2, 0), (24 * r, 24, 3, 0)],
        "padded": lambda r: [(10 * r, 10, 1, 0), (16 * r, 16, 1, 0), (16 * r, 16, 1, 11), (20 * r, 20, 1, 0)],
    }
    for layout, expected in ways.items():
        laid = {rows: lay_out(torch.zeros(2, rows, 5), layout) for rows in range(3, 60) if rows % 16 != 9}
        found = {expected(rows).index((*x.stride(), x.storage_offset())) for rows, x in laid.items()}
        assert found == {*range(len(expected(3)))}


def test_where_a_buffer_is_entered_varies_and_so_does_its_alignment() -> None:
    found = {lay_out(torch.zeros(rows, dtype=torch.uint8), "offset").storage_offset() for rows in range(1, 60)}
    assert found == {13, 8, 4, 2, 16}


def test_gates_lie_as_one_column_or_as_one_row() -> None:
    gates = torch.ones(3, 4)
    assert Call(gates="expanded").lay_out("gates", gates).stride() == (1, 0)
    assert Call(gates="one row").lay_out("gates", gates).stride() == (0, 1)


def test_each_index_tensor_lies_by_itself_and_shares_memory_only_where_it_is_the_same_everywhere() -> None:
    call = Call(ids="expanded", rows="sliced")
    same, ascending = torch.full((4,), 3), torch.arange(4)
    assert call.lay_out("sorted_expert_idxs", same).stride() == (0,)
    assert call.lay_out("sorted_expert_idxs", ascending).is_contiguous()
    assert call.lay_out("sorted_scattered_idxs", ascending).stride() in ((2,), (3,))
    assert call.lay_out("expert_offsets", ascending).is_contiguous()
    assert Call(ends="expanded").lay_out("expert_offsets", same).stride() == (0,)


def test_a_call_can_be_made_where_tensors_have_no_memory_by_default() -> None:
    with Call(default_device="meta").in_both_passes():
        assert torch.zeros(1).is_meta
    assert not torch.zeros(1).is_meta
