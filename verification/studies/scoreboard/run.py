"""Who computes this layer right? Every implementation that can be found, judged by the same checks.

Each one runs in processes of its own, see `gate.isolated`, so that what a foreign kernel does to the GPU or to the
interpreter's modules hurts nobody else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import torch

from mxref.verification.candidates.known import implementation, is_own
from mxref.verification.cases.scope import Scope, Suite
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.gate.isolated import judge_apart
from mxref.verification.gate.order import Order
from mxref.verification.gate.plan import plan
from mxref.verification.gate.process import ItemInfo, Refused
from mxref.verification.gate.result import GateResult, describe_device

_TIMEOUT = 300.0
"""Seconds of processor time for one item: compiling takes tens."""
_LOSSES = 60
"""Processes that an implementation may lose, a case each: where a kernel faults, its process has lost the GPU."""


@dataclass
class Row:
    """One implementation's line, as plain data.

    Attributes:
        name: as in `candidates.known`.
        about: what it is.
        package: the distribution that it comes from, with its version.
        unavailable: why nothing was judged; empty when it was.
        started: when it was judged.
        seconds: what that took.
        covers: the part of the domain that it is asked about, in the domain's words; empty for all of it.
        rounding_points: it is judged by; empty for the contract's.
        accumulation: likewise.
        left_out: checks that were not asked, and why.
        counts: judgements by check and status.
        declined: how many judgements it declined, by its reason.
        failures: the first failure of each check and tensor as `Finding.as_json` has it, and `count`, how many there
            are of its kind.
    """

    name: str
    about: str = ""
    package: str = ""
    unavailable: str = ""
    started: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))
    seconds: float = 0.0
    covers: str = ""
    rounding_points: list[str] = field(default_factory=list)
    accumulation: str = ""
    left_out: str = ""
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    declined: dict[str, int] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def fill(self, result: GateResult) -> None:
        """What the gate says of it."""
        candidate, findings = result.candidate, result.findings
        self.covers, self.rounding_points = str(candidate.covers), list(candidate.declared_points)
        self.accumulation, self.left_out = str(result.accumulation), result.left_out
        self.seconds = round(result.seconds, 1)
        for finding in findings:
            counted = self.counts.setdefault(finding.check, {})
            counted[finding.status] = counted.get(finding.status, 0) + 1
        self.declined = dict(Counter(each.reason for each in findings if each.status is Status.NOT_COVERED))
        self.failures = _first_failures(findings)


@dataclass
class Board:
    """The table, and what its rows were asked.

    Attributes:
        device: in words.
        suite, seed, only: as the command has them.
        asked: sixteen digits of all items that this project's kernels are asked here.
        rows: by implementation.
    """

    device: str
    suite: Suite
    seed: int
    only: list[str] = field(default_factory=list)
    asked: str = ""
    rows: list[Row] = field(default_factory=list)

    def checks(self) -> list[str]:
        """Checks that judged anything, in their order."""
        return list(dict.fromkeys(check for row in self.rows for check in row.counts))


def empty_board(device: torch.device, *, full: bool, seed: int, only: Sequence[str] = ()) -> Board:
    """The table before anyone is judged.

    Args:
        device: where.
        full: the release suite instead of the quick one.
        seed: of every draw.
        only: cases, or checks, that match one of these patterns; empty for all.
    """
    suite: Suite = "full" if full else "quick"
    items = plan(Scope(suite, device.type, seed), own=True)
    asked = sha256(" ".join(item.id for item in items).encode()).hexdigest()[:16]
    return Board(describe_device(device), suite, seed, list(only), asked)


def run_scoreboard(
    board: Board,
    names: Sequence[str],
    device: torch.device,
    *,
    processes: int = 1,
    on_item: Callable[[str, int, int, str], None] = lambda name, done, total, case: None,
) -> None:
    """Judge each implementation in turn, and add its row.

    What this project's foreign entries say of their accumulation was read in others' code, so the order-free bound is a
    second chance for it.

    Args:
        board: what they are asked.
        names: see `candidates.known.implementation`.
        device: where.
        processes: that share one implementation's items; compiling its kernels is what takes the time.
        on_item: called with the name, finished items, all items and the case that is judged next.
    """
    for name in names:
        who = implementation(name)
        row = Row(name, who.about, f"{who.package} {who.version()}".strip())
        board.rows.append(row)
        if not who.installed:
            row.unavailable = "not installed"
        elif device.type not in who.devices:
            row.unavailable = f"needs {' or '.join(who.devices)}"
        else:
            order = Order(
                name, device.type, board.suite, board.seed, patterns=tuple(board.only), lenient=not is_own(name)
            )
            _judge(row, order, processes, on_item)


def _judge(row: Row, order: Order, processes: int, on_item: Callable[[str, int, int, str], None]) -> None:
    def told(item: ItemInfo, done: int, total: int) -> None:
        on_item(row.name, done, total, item.case)

    try:
        row.fill(
            judge_apart(order, suite=order.suite, timeout=_TIMEOUT, processes=processes, losses=_LOSSES, on_item=told)
        )
    except Refused as refused:
        row.unavailable = str(refused)


def _first_failures(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Without tracebacks, which hold paths of the machine and lines of other projects' sources."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        if finding.status is Status.FAIL:
            groups.setdefault((finding.check, finding.tensor), []).append(finding)
    return [replace(group[0], trace="").as_json() | {"count": len(group)} for group in groups.values()]
