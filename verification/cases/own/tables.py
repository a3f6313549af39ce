"""Routings whose tables of tiles and rows are asked for entry by entry.

Products hide what is wrong with a schedule where two mistakes cancel, where a tile is computed twice, or where no case
has as many tiles as one expert of a real batch. The tables themselves do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_HEIGHTS = (16, 32, 128)
_MANY = 1 << 19


@dataclass(frozen=True)
class TableCase:
    """One routing.

    Attributes:
        name: in words.
        P: routed rows.
        offsets: inclusive cumulative counts; those out of 0..P count as if they were forced into it.
        known: whether the tables are determined; offsets that do not ascend ask for more tiles than there can be, so
            that nobody knows the result, but it has to fit.
        astray: every third routed row's position is 2^32 more than one within range, which nobody may take for that.
    """

    name: str
    P: int
    offsets: tuple[int, ...]
    known: bool = True
    astray: bool = False

    @property
    def heights(self) -> tuple[int, ...]:
        """Rows a tile that are asked for."""
        return _HEIGHTS if self.P < _MANY else _HEIGHTS[:1]

    @property
    def ends(self) -> list[int]:
        """The offsets forced into 0..P."""
        return [min(max(end, 0), self.P) for end in self.offsets]

    def positions(self) -> Tensor:
        """A permutation of 0..P−1, but for what is astray; int64 on the CPU."""
        positions = torch.randperm(self.P, generator=torch.Generator().manual_seed(self.P))
        if self.astray:
            positions[::3] += 1 << 32
        return positions

    def sample(self, device: torch.device, seed: int) -> TableSample:
        """The routing there; nothing of it is drawn."""
        return TableSample(self, device)


@dataclass(frozen=True)
class TableSample:
    """A routing on a device."""

    case: TableCase
    device: torch.device


def table_cases() -> list[TableCase]:
    """Ordinary ones, the worst, the smallest, and offsets out of range."""
    return [
        TableCase("ordinary", 200, (0, 33, 33, 65, 129, 130)),
        TableCase("all owned", 48, (16, 32, 48)),
        TableCase("worst case", 3 * 31 + 1, (31, 62, 93)),
        TableCase("one row", 1, (0, 1)),
        TableCase("no rows", 0, (0, 0)),
        TableCase("200 experts", 600, tuple(range(3, 600, 3))),
        TableCase("no sentinels, one expert", 64, (64,)),
        TableCase("thousands of rows", 5000, (7, 4900)),
        TableCase("one more than 1024", 1025, (1025,)),
        TableCase("one more than 2^15 tiles", _MANY + 1, (_MANY + 1,)),
        TableCase("out of range", 70, (-3, -1, 40, 75, 71)),
        TableCase("far out of range", 70, (5 - 2**40, -(2**40), 40, 2**40, 2**40 + 1)),
        TableCase("positions astray", 70, (20, 60), astray=True),
        TableCase("not ascending", 80, (80, 0, 80, 0, 80), known=False),
    ]
