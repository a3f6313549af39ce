"""Row tiles: every routed row in exactly one tile, no tile across two experts, whatever the counts.

The tables of chosen routings are compared entry by entry by the gate's check "tables".
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxref.kernels.device.schedule import Routing, tile_bound

COUNTS = st.lists(st.sampled_from([0, 0, 1, 15, 16, 17, 64, 300]), min_size=1, max_size=9)
KERNELS = settings(max_examples=25)


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
