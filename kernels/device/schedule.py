"""Routed rows to row tiles, on the device, without a host synchronisation.

A tile is at most BLOCK_M consecutive rows, in expert order, of one group: an expert, or the sentinel rows after the
last expert. The host knows only P and E, so it launches the static bound of tiles and the surplus ones are empty.
The sum over slots needs the inverse too: which routed row is at a position. One launch makes both tables.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxref.kernels.device.launch import PreparedLaunch

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


@triton.jit(do_not_specialize=["E", "bound"])
def tables_kernel(
    positions,
    offsets,
    tiles,
    inverse,
    P,
    E,
    bound,
    span,
    BLOCK_M: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Programs 0..E write the tiles of one group each, those behind them `span` entries each of the inverse."""
    program = tl.program_id(0)
    if program <= E:
        write_tiles(tiles, offsets, program, P, E, bound, BLOCK_M, GROUPS, TILES)
    elif inverse is not None:
        write_inverse(inverse, positions, offsets, (program - E - 1).to(tl.int64) * span, P, E, span, CHUNK)


@triton.jit
def write_tiles(tiles, offsets, group, P, E, bound, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr):
    """(group, first row, one past the last row) for each tile of a group; group E holds the sentinels.

    All groups' tiles (GROUPS ≥ E + 1 of them) are counted to find where the group's own begin. Group E also writes the
    surplus.
    """
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
    for start in range(0, mine, TILES):
        t = start + tl.arange(0, TILES)
        live = (t < mine) & (first + t < bound)
        entry = tiles + (first + t) * 3
        row = begin + t * BLOCK_M
        tl.store(entry, group, mask=live)
        tl.store(entry + 1, row, mask=live)
        tl.store(entry + 2, tl.minimum(row + BLOCK_M, end), mask=live)
    surplus = tl.where(group == E, first + mine, bound)
    for word in range(surplus * 3, bound * 3, TILES):
        words = word + tl.arange(0, TILES)
        tl.store(tiles + words, 0, mask=words < bound * 3)


@triton.jit
def write_inverse(inverse, positions, offsets, lowest, P, E, span, CHUNK: tl.constexpr):
    """inverse[position] = routed row for rows that an expert owns, −1 elsewhere, at positions lowest..lowest + span.

    Every row is looked at, for its position may be any; one that is out of range is in no program's part.
    """
    highest = tl.minimum(lowest + span, P)
    for entry in range(lowest, highest, CHUNK):
        entries = entry + tl.arange(0, CHUNK)
        tl.store(inverse + entries, -1, mask=entries < highest)
    tl.debug_barrier()
    owned = tl.minimum(tl.load(offsets + E - 1).to(tl.int64), P)
    for row in range(0, owned, CHUNK):
        rows = row + tl.arange(0, CHUNK)
        position = tl.load(positions + rows, mask=rows < owned, other=-1).to(tl.int64)
        tl.store(inverse + position, rows, mask=(position >= lowest) & (position < highest))


def tile_bound(rows: int, experts: int, block_m: int) -> int:
    """The most tiles that P rows in E expert groups and one sentinel group can need: Σ⌈c/BLOCK_M⌉ at its worst."""
    groups = min(experts + 1, rows)
    return (rows + groups * (block_m - 1)) // block_m


@lru_cache(4096)
def _tables(P: int, E: int, block_m: int, with_inverse: bool, *alike: Hashable) -> PreparedLaunch:
    """The launch that makes a routing's tables; a sixteenth of the inverse is a program's, or as much as pays.

    Always a multiple of 16 entries, so that it is filled 16 bytes at a time and by one kernel.
    """
    span = max(4096, 16 * triton.cdiv(P, 256))
    programs = E + 1 + (triton.cdiv(P, span) if with_inverse else 0)
    return PreparedLaunch(
        tables_kernel,
        programs if P else 0,
        num_warps=4,
        num_stages=1,
        P=P,
        E=E,
        bound=tile_bound(P, E, block_m),
        span=span,
        BLOCK_M=block_m,
        GROUPS=triton.next_power_of_2(E + 1),
        TILES=128,
        CHUNK=4096,
    )


class Routing:
    """One routing as the kernels read it; tables derived from it are made once, on first use, and serve every call.

    Attributes:
        positions: integer [P], position token·k + slot of each routed row in expert order.
        offsets: integer [E], inclusive cumulative counts; rows at or beyond the last belong to no expert.
        P: routed rows.
        E: experts.
        tables: those that were made already: tiles by their height, and the inverse.
    """

    INVERSE = 0
    """The inverse's key among the tables; no tile has this height."""

    def __init__(self, positions: Tensor, offsets: Tensor, tables: dict[int, Tensor] | None = None) -> None:
        self.positions, self.offsets = positions, offsets
        self.P, self.E = positions.shape[0], offsets.shape[0]
        self.tables = {} if tables is None else tables

    def tiles(self, block_m: int, stream: int | None = None) -> Tensor:
        """int32 [bound, 3]: (group, first row, one past the last row) of each tile; the surplus is (0, 0, 0)."""
        if block_m not in self.tables:
            self._make(block_m, stream)
        return self.tables[block_m]

    def inverse(self, stream: int | None = None) -> Tensor:
        """int32 [P]: the routed row at each position, −1 where a sentinel holds it."""
        if self.INVERSE not in self.tables:
            self._make(16, stream)
        return self.tables[self.INVERSE]

    def _make(self, block_m: int, stream: int | None) -> None:
        """The tiles of one height, and with the first of them the inverse."""
        known = self.tables.get(self.INVERSE)
        inverse = self.offsets.new_empty(self.P, dtype=torch.int32) if known is None else known
        tiles = inverse.new_empty(tile_bound(self.P, self.E, block_m), 3)
        positions, offsets = self.positions, self.offsets
        launch = _tables(self.P, self.E, block_m, known is None, offsets.device, positions.dtype, offsets.dtype)
        launch(stream, positions, offsets, tiles, inverse if known is None else None)
        self.tables[block_m], self.tables[self.INVERSE] = tiles, inverse
