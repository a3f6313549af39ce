"""Routed rows to row tiles, on the device, without a host synchronisation.

A tile is at most BLOCK_M consecutive rows, in expert order, of one group: an expert, or the sentinel rows after the
last expert. The host knows only P and E, so it launches the static bound of tiles and the surplus ones are empty.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxref.kernels.device.launch import launch

__all__ = ["Routing", "expert_rows", "tile_bound"]


@triton.jit
def source_rows(rows, live, positions, fan, P):
    """Where a buffer holds the routed rows: `rows` itself in expert order (`fan` None), else positions[rows] //
    fan.

    Returns row numbers and a mask; a position outside 0..P−1 is masked, never dereferenced.
    """
    if fan is None:
        return rows, live
    else:
        position = tl.load(positions + rows, mask=live, other=-1).to(tl.int64)
        return position // fan, (position >= 0) & (position < P)


@triton.jit
def expert_rows(offsets, expert, P):
    """First and one-past-last row of one expert, forced into 0..P."""
    begin = tl.load(offsets + expert - 1, mask=expert > 0, other=0).to(tl.int64)
    end = tl.load(offsets + expert).to(tl.int64)
    return tl.minimum(tl.maximum(begin, 0), P), tl.minimum(tl.maximum(end, 0), P)


@triton.jit
def tiles_kernel(tiles, offsets, P, E, bound, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr):
    """Program g writes (g, first row, one past the last row) for each tile of group g; group E holds the sentinels.

    Every program counts all groups' tiles (GROUPS ≥ E + 1 of them) to find where its own begin.
    """
    group = tl.program_id(0)
    g = tl.arange(0, GROUPS)
    begins = tl.load(offsets + g - 1, mask=(g > 0) & (g <= E), other=0).to(tl.int64)
    ends = tl.load(offsets + g, mask=g < E, other=P).to(tl.int64)
    begins = tl.minimum(tl.maximum(begins, 0), P)
    ends = tl.minimum(tl.maximum(ends, 0), P)
    counts = tl.where(g <= E, (tl.maximum(ends - begins, 0) + BLOCK_M - 1) // BLOCK_M, 0)
    first = tl.sum(tl.where(g < group, counts, 0))
    mine = tl.sum(tl.where(g == group, counts, 0)).to(tl.int32)
    begin = tl.sum(tl.where(g == group, begins, 0))
    end = tl.sum(tl.where(g == group, ends, 0))
    for start in range(0, mine, CHUNK):
        t = start + tl.arange(0, CHUNK)
        live = (t < mine) & (first + t < bound)
        entry = tiles + (first + t) * 3
        row = begin + t * BLOCK_M
        tl.store(entry, group, mask=live)
        tl.store(entry + 1, row, mask=live)
        tl.store(entry + 2, tl.minimum(row + BLOCK_M, end), mask=live)


@triton.jit
def inverse_kernel(inverse, positions, offsets, P, E, BLOCK: tl.constexpr):
    """inverse[position] = routed row, for rows that an expert owns; the other entries keep their −1."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = rows < tl.minimum(tl.load(offsets + E - 1).to(tl.int64), P)
    position, live = source_rows(rows, live, positions, 1, P)
    tl.store(inverse + position, rows, mask=live)


def tile_bound(rows: int, experts: int, block_m: int) -> int:
    """The most tiles that P rows in E expert groups and one sentinel group can need: Σ⌈c/BLOCK_M⌉ at its worst."""
    groups = min(experts + 1, rows)
    return (rows + groups * (block_m - 1)) // block_m


_INVERSE = 0
"""The inverse's key among a routing's tables; no tile has this height."""


@dataclass(frozen=True)
class Routing:
    """One call's routing as the kernels read it; tables derived from it are made once, on first use.

    Attributes:
        positions: integer [P], position token·k + slot of each routed row in expert order.
        offsets: integer [E], inclusive cumulative counts; rows at or beyond the last belong to no expert.
        tables: those that were made already.
    """

    positions: Tensor
    offsets: Tensor
    tables: dict[int, Tensor] = field(default_factory=dict)

    @property
    def P(self) -> int:
        """Routed rows."""
        return self.positions.numel()

    @property
    def E(self) -> int:
        """Experts."""
        return self.offsets.numel()

    def tiles(self, block_m: int) -> Tensor:
        """int32 [bound, 3]: (group, first row, one past the last row) of each tile; the surplus is (0, 0, 0)."""
        if block_m not in self.tables:
            bound = tile_bound(self.P, self.E, block_m)
            tiles = torch.zeros(bound, 3, dtype=torch.int32, device=self.offsets.device)
            launch(
                tiles_kernel,
                self.E + 1 if bound else 0,
                num_warps=4,
                num_stages=1,
                tiles=tiles,
                offsets=self.offsets,
                P=self.P,
                E=self.E,
                bound=bound,
                BLOCK_M=block_m,
                GROUPS=triton.next_power_of_2(self.E + 1),
                CHUNK=128,
            )
            self.tables[block_m] = tiles
        return self.tables[block_m]

    def inverse(self) -> Tensor:
        """int32 [P]: the routed row at each position, −1 where a sentinel holds it."""
        if _INVERSE not in self.tables:
            inverse = torch.full((self.P,), -1, dtype=torch.int32, device=self.offsets.device)
            launch(
                inverse_kernel,
                triton.cdiv(self.P, 1024),
                num_warps=4,
                num_stages=1,
                inverse=inverse,
                positions=self.positions,
                offsets=self.offsets,
                P=self.P,
                E=self.E,
                BLOCK=1024,
            )
            self.tables[_INVERSE] = inverse
        return self.tables[_INVERSE]
