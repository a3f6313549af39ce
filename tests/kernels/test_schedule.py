"""Row tiles: every routed row in exactly one tile, no tile across two experts, whatever the counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mxref.kernels.device.schedule import Routing, tile_bound

COUNTS = st.lists(st.sampled_from([0, 0, 1, 15, 16, 17, 64, 300]), min_size=1, max_size=9)
settings.register_profile(
    "kernels", max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
KERNELS = settings.get_profile("kernels")


def routing_for(counts: list[int], sentinels: int, device: torch.device) -> Routing:
    offsets = torch.tensor(counts, device=device).cumsum(0)
    P = sum(counts) + sentinels
    return Routing(torch.randperm(P, generator=torch.Generator().manual_seed(P)).to(device), offsets)


@KERNELS
@given(counts=COUNTS, sentinels=st.sampled_from([0, 1, 40]), block_m=st.sampled_from([16, 64]))
def test_tiles_partition_the_rows(device: torch.device, counts: list[int], sentinels: int, block_m: int) -> None:
    routing = routing_for(counts, sentinels, device)
    tiles = routing.tiles(block_m).tolist()
    assert len(tiles) == tile_bound(routing.P, routing.E, block_m)
    owner = [e for e, count in enumerate([*counts, sentinels]) for _ in range(count)]
    covered = []
    for group, begin, end in tiles:
        assert end - begin <= block_m
        assert owner[begin:end] == [group] * (end - begin), "a tile belongs to one group"
        covered += range(begin, end)
    assert sorted(covered) == list(range(routing.P))


@KERNELS
@given(counts=COUNTS, sentinels=st.sampled_from([0, 1, 40]))
def test_inverse_marks_sentinels(device: torch.device, counts: list[int], sentinels: int) -> None:
    routing = routing_for(counts, sentinels, device)
    expected = torch.empty(routing.P, dtype=torch.int64)
    expected[routing.positions.cpu()] = torch.arange(routing.P)
    expected[expected >= sum(counts)] = -1
    assert routing.inverse().tolist() == expected.tolist()


def test_thousands_of_rows_for_one_expert(device: torch.device) -> None:
    """More tiles than one program writes at a time."""
    tiles = routing_for([0, 16 * 300, 0], 0, device).tiles(16)
    assert tiles[:300, 1].tolist() == list(range(0, 4800, 16))
    assert (tiles[:300, 0] == 1).all()


@pytest.mark.parametrize("offsets", [[-5, 3, 9], [7, 2, 4], [2**40, -(2**40), 100]])
def test_wild_offsets_stay_inside(device: torch.device, offsets: list[int]) -> None:
    tiles = Routing(torch.arange(10, device=device), torch.tensor(offsets, device=device)).tiles(16)
    live = tiles[tiles[:, 1] < tiles[:, 2]]
    assert ((live[:, 1:] >= 0) & (live[:, 1:] <= 10)).all()


def test_wild_positions_are_skipped(device: torch.device) -> None:
    routing = Routing(torch.tensor([0, 99, -7, 2], device=device), torch.tensor([4], device=device))
    assert routing.inverse().tolist() == [0, -1, 3, -1]
