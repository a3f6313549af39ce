"""The kernels' own tables of a routing, judged entry by entry: which rows each tile holds, which row lies where.

Products hide what is wrong with a schedule where two mistakes cancel, where a tile is computed twice, or where no case
has as many tiles as one expert of a real batch. The tables themselves do not.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mxref.verification.candidates.memory.margins import Margins
from mxref.verification.candidates.memory.red_zones import Fence
from mxref.verification.checks.finding import Finding, Status

__all__ = ["schedule_guard"]

_HEIGHTS = (16, 32, 128)

_OFFSETS: dict[str, tuple[int, list[int]]] = {
    "ordinary": (200, [0, 33, 33, 65, 129, 130]),
    "all owned": (48, [16, 32, 48]),
    "worst case": (3 * 31 + 1, [31, 62, 93]),
    "one row": (1, [0, 1]),
    "no rows": (0, [0, 0]),
    "no sentinels, one expert": (64, [64]),
    "thousands of rows": (5000, [7, 4900]),
    "one more than 1024": (1025, [1025]),
    "one more than 2^15 tiles": ((1 << 19) + 1, [(1 << 19) + 1]),
    "out of range": (70, [-3, -1, 40, 75, 71]),
    "far out of range": (70, [5 - 2**40, -(2**40), 40, 2**40, 2**40 + 1]),
}
"""Name -> (P, offsets). Offsets out of 0..P count as if they were forced into it."""

_SCRAMBLED = (80, [80, 0, 80, 0, 80])
"""Offsets that do not ascend ask for more tiles than there can be: nobody knows the result, but it has to fit."""


def schedule_guard(kernels: ModuleType, device: torch.device) -> list[Finding]:
    """`Routing.tiles` and `Routing.inverse` of many offsets, every entry; nothing is written outside a table.

    Args:
        kernels: a module with `schedule.Routing`.
        device: where to judge.
    """
    findings = []
    for name, (P, offsets) in _OFFSETS.items():
        with Margins() as margins:
            routing = _routing(kernels, P, offsets, device)
            ends = [min(max(end, 0), P) for end in offsets]
            for height in _HEIGHTS if P < 1 << 19 else _HEIGHTS[:1]:
                expected = _tiles(P, ends, height)
                findings.append(_equal(f"{name}, {height} rows a tile", routing.tiles(height), expected))
                findings.append(_equal(f"{name}, {height} rows a tile, again", routing.tiles(height), expected))
            findings.append(_equal(f"{name}, inverse", routing.inverse(), _inverse(routing.positions, ends[-1])))
        findings.append(_intact(name, margins))
    with Margins() as margins:
        routing = _routing(kernels, *_SCRAMBLED, device)
        for height in _HEIGHTS:
            routing.tiles(height)
    return [*findings, _intact("scrambled", margins)]


def _routing(kernels: ModuleType, P: int, offsets: list[int], device: torch.device) -> Any:
    positions = torch.randperm(P, generator=torch.Generator().manual_seed(P)).to(device)
    fenced = Fence(torch.tensor(offsets, device=device), P + 1)
    return kernels.device.schedule.Routing(Fence(positions, P).inside, fenced.inside)


def _tiles(P: int, ends: list[int], height: int) -> Tensor:
    """int32 [tiles that P rows in that many groups can need, 3], the surplus zero."""
    begins = [0, *ends]
    rows = [
        (group, first, min(first + height, end))
        for group, (begin, end) in enumerate(zip(begins, [*ends, P], strict=True))
        for first in range(begin, end, height)
    ]
    groups = min(len(ends) + 1, P)
    table = torch.zeros((P + groups * (height - 1)) // height, 3, dtype=torch.int32)
    if rows:
        table[: len(rows)] = torch.tensor(rows, dtype=torch.int32)
    return table


def _inverse(positions: Tensor, owned: int) -> Tensor:
    """int32 [P]: the routed row at each position; −1 where no expert owns it."""
    inverse = torch.full((positions.numel(),), -1, dtype=torch.int32)
    inverse[positions[:owned].cpu()] = torch.arange(owned, dtype=torch.int32)
    return inverse


def _equal(name: str, got: Tensor, expected: Tensor) -> Finding:
    elements = expected.numel()
    if got.shape != expected.shape or got.dtype != expected.dtype:
        form = f"is {got.dtype} {tuple(got.shape)}; expected {expected.dtype} {tuple(expected.shape)}"
        return Finding("schedule", name, "table", Status.FAIL, form, elements, elements)
    wrong = int((got.cpu() != expected).sum())
    status = Status.FAIL if wrong else Status.PASS
    return Finding("schedule", name, "table", status, f"{wrong} entries are wrong", elements, wrong)


def _intact(name: str, margins: Margins) -> Finding:
    damage = margins.damage()
    status = Status.FAIL if damage else Status.PASS
    return Finding(
        "schedule", name, "memory", status, damage or "nothing written outside a table", 0, int(bool(damage))
    )
