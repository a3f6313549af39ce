"""Who computes this layer right? Every implementation that can be found, judged by the same checks.

Each one runs in processes of its own, see `gate.isolated`, so that what a foreign kernel does to the GPU or to the
interpreter's modules hurts nobody else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import torch

from mxref.verification.candidates.known import implementation, is_own
from mxref.verification.cases.scope import Suite
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.gate.isolated import judge_apart
from mxref.verification.gate.order import Order
from mxref.verification.gate.process import ItemInfo, Refused
from mxref.verification.gate.result import GateResult, describe_device

_TIMEOUT = 300.0
"""Seconds of processor time for one item: compiling takes tens."""


@dataclass
class Row:
    """One implementation's line.

    Attributes:
        name: as in `candidates.known`.
        about: what it is.
        package: the distribution that it comes from, with its version.
        unavailable: why nothing was judged; empty when it was.
        result: what the gate says; None when nothing was judged.
    """

    name: str
    about: str = ""
    package: str = ""
    unavailable: str = ""
    result: GateResult | None = None

    @property
    def findings(self) -> list[Finding]:
        """All of them."""
        return [] if self.result is None else self.result.findings

    @property
    def points(self) -> tuple[str, ...]:
        """Rounding points it is judged by; empty for the contract's."""
        return () if self.result is None else self.result.candidate.declared_points

    @property
    def covers(self) -> str:
        """The part of the domain that it is asked about, in the domain's words; empty for all of it."""
        return "" if self.result is None else str(self.result.candidate.covers)

    def counts(self, check: str) -> Counter[Status]:
        """Findings of one check by status."""
        return Counter(finding.status for finding in self.findings if finding.check == check)

    def first_failures(self) -> list[tuple[Finding, int]]:
        """The first failure of each check and tensor, and how many there are of its kind."""
        groups: dict[tuple[str, str], list[Finding]] = {}
        for finding in self.findings:
            if finding.status is Status.FAIL:
                groups.setdefault((finding.check, finding.tensor), []).append(finding)
        return [(group[0], len(group)) for group in groups.values()]


@dataclass
class Board:
    """The table, and where it comes from."""

    device: str
    suite: str
    seed: int
    only: tuple[str, ...] = ()
    rows: list[Row] = field(default_factory=list)
    started: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))

    def checks(self) -> list[str]:
        """Checks that judged anything, in their order."""
        return list(dict.fromkeys(finding.check for row in self.rows for finding in row.findings))


def run_scoreboard(
    names: Sequence[str],
    device: torch.device,
    *,
    full: bool,
    seed: int,
    only: Sequence[str] = (),
    processes: int = 1,
    on_item: Callable[[str, int, int, str], None] = lambda name, done, total, case: None,
) -> Board:
    """Judge each implementation in turn.

    What this project's foreign entries say of their accumulation was read in others' code, so the order-free bound is a
    second chance for it.

    Args:
        names: see `candidates.known.implementation`.
        device: where.
        full: the release suite instead of the quick one.
        seed: of every draw.
        only: cases, or checks, that match one of these patterns; empty for all.
        processes: that share one implementation's items; compiling its kernels is what takes the time.
        on_item: called with the name, finished items, all items and the case that is judged next.
    """
    suite: Suite = "full" if full else "quick"
    board = Board(describe_device(device), suite, seed, tuple(only))
    for name in names:
        who = implementation(name)
        row = Row(name, who.about, f"{who.package} {who.version()}".strip())
        board.rows.append(row)
        if not who.installed:
            row.unavailable = "not installed"
        elif device.type not in who.devices:
            row.unavailable = f"needs {' or '.join(who.devices)}"
        else:
            order = Order(name, device.type, suite, seed, patterns=tuple(only), lenient=not is_own(name))
            _judge(row, order, processes, on_item)
    return board


def _judge(row: Row, order: Order, processes: int, on_item: Callable[[str, int, int, str], None]) -> None:
    def told(item: ItemInfo, done: int, total: int) -> None:
        on_item(row.name, done, total, item.case)

    try:
        row.result = judge_apart(order, suite=order.suite, timeout=_TIMEOUT, processes=processes, on_item=told)
    except Refused as refused:
        row.unavailable = str(refused)
