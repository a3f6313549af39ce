"""Judges a candidate in processes of its own; there is a verdict whatever becomes of them.

A process (see `process`) makes the candidate and the items from an order, and sends findings item by item. It is ended
when an item takes too much processor time, or it is silent for too long. If it is lost, the current item has failed,
and another goes on behind it. What lacked a GPU's memory, or a process that was lost before, is asked again at last.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch

from mxref.verification.arithmetic.accumulation import default_accumulation
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.known import is_own
from mxref.verification.candidates.processes import Ended, Job, Limits, Method, Pool
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.checks.registry import STATE
from mxref.verification.clone import IS_CLONE, of_a_clone
from mxref.verification.gate.order import Order
from mxref.verification.gate.process import (
    Asking,
    Done,
    Fault,
    ItemInfo,
    Judged,
    Lost,
    Numbers,
    Planned,
    Refused,
    elsewhere,
    work,
)
from mxref.verification.gate.result import GateResult

LOADING = "loading"
"""What findings are of before any check."""
TIMEOUT = 900.0
"""Seconds of processor time that one item may take unless told otherwise; a first compilation takes tens of seconds."""
_PATIENCE = {"cpu": 4.0, "cuda": 2.0}
"""Silence by the clock, in units of that: a deadlock takes no processor time, nor does a GPU that does not end."""
MOST_LOSSES = 3
"""Processes that may be lost before what is left is not asked, unless told otherwise."""


def judge_apart(
    order: Order,
    *,
    suite: str,
    strict: bool = False,
    timeout: float = TIMEOUT,
    fail_fast: bool = False,
    processes: int = 1,
    losses: int = MOST_LOSSES,
    on_item: Callable[[ItemInfo, int, int], None] = lambda entry, done, total: None,
) -> GateResult:
    """Judge what is ordered.

    Args:
        strict: see `GateResult.exit_code`.
        timeout: processor time of one item, in seconds.
        fail_fast: stop after the first item that fails.
        losses: processes that may be lost before what is left is not asked.
        on_item: called before each item with the numbers of items done and of all.

    Raises:
        Refused: no such candidate, or nothing to ask.
        KeyboardInterrupt: nothing was judged yet.
    """
    start, run = time.monotonic(), _Run(order, suite, strict, losses)
    limits = _limits(order, timeout)

    def ask(parts: Sequence[_Part]) -> bool:
        """Ask for every part's items; whether it ended by itself."""
        pool.waiting.extend(part.job(limits) for part in parts)
        for job, message in pool:
            if isinstance(message, Ended):
                if run.lost(job.about, message) and run.goes_on:
                    pool.waiting.append(job.about.job(limits))
                continue
            run.hear(job.about, message)
            if isinstance(message, Asking) and not message.compared:
                on_item(run.entries[message.number], len(run.found), len(run.entries))
            if fail_fast and not all(finding.ok for findings in run.found.values() for finding in findings):
                return False
        return True

    every = Numbers(range(sys.maxsize))
    with _compiling(order, every), TemporaryDirectory() as folder, _pool(order, processes) as pool:
        parts = [_Part(order, every, processes, Path(folder) / str(number)) for number in range(processes)]
        try:
            if ask(parts) and run.left and run.goes_on:
                ask([_Part(order, Numbers(run.left), 1, Path(folder) / "alone")])
        except KeyboardInterrupt:
            if not run.found:
                raise
            run.result.interrupted = True
    run.close()
    run.result.seconds = time.monotonic() - start
    return run.result


def _limits(order: Order, timeout: float) -> Limits:
    return Limits(timeout, _PATIENCE[order.device.type] * timeout)


def _pool(order: Order, size: int = 1) -> Pool[_Part]:
    """Processes with this module's and autograd's imports; none on a GPU, which forks cannot share."""
    method: Method = "forkserver" if order.device.type == "cpu" else "spawn"
    return Pool(size, method, [work.__module__, "torch.fx.experimental.symbolic_shapes"])


def _compiling(order: Order, numbers: Numbers) -> AbstractContextManager[None]:
    """On a GPU, in a clone, shipped kernels are compiled meanwhile; items wait for theirs."""
    if order.device.type == "cpu" or not is_own(order.kernel) or not IS_CLONE:
        return nullcontext()
    ahead = of_a_clone("gate.own.ahead", "compiling ahead")  # imports the kernels
    return cast(AbstractContextManager[None], ahead.compiling_ahead(order, numbers))


def list_items(order: Order) -> list[ItemInfo]:
    """What the candidate is asked.

    Raises:
        Refused: as `judge_apart`, or the candidate ends the process that loads it.
    """
    with TemporaryDirectory() as folder, _pool(order) as pool:
        part = _Part(order, Numbers(range(sys.maxsize)), 1, Path(folder) / "0")
        pool.waiting.append(part.job(_limits(order, TIMEOUT)))
        for _, message in pool:
            if isinstance(message, Planned):
                return message.entries
            if isinstance(message, Refused | Ended):
                raise Refused(str(message))
    raise AssertionError("a process that is over has ended")


@dataclass(eq=False)
class _Part:
    """One of the processes that share the items, and its replacements.

    Attributes:
        numbers: of items, shared with the others.
        sharing: number of processes.
        crash: file of a crash's traceback, by faulthandler.
        at: the last item asked; None before the first.
        compared: whether the candidate has answered it.
        lost_for: why the process cannot go on.
    """

    order: Order
    numbers: Numbers
    sharing: int
    crash: Path
    at: int | None = None
    compared: bool = False
    done: bool = False
    lost_for: str = ""

    def job(self, limits: Limits) -> Job[_Part]:
        self.at, self.compared, self.lost_for = None, False, ""
        return Job(self, work, (self.order, self.numbers, self.sharing, self.crash), limits)

    def trace(self) -> str:
        return self.crash.read_text(encoding="utf-8", errors="replace").strip() if self.crash.is_file() else ""


class _Run:
    """What is known so far of one run.

    Attributes:
        found: findings by the item's number; those of the loading come first.
        losses: processes lost.
        most: of them; then what is left is not asked.
    """

    def __init__(self, order: Order, suite: str, strict: bool, most: int = MOST_LOSSES) -> None:
        how = default_accumulation(torch.device("cpu"))
        nobody = Candidate(order.kernel, elsewhere)
        self.result = GateResult(nobody, how, order.device_type, suite, order.seed, strict)
        self.result.narrowed, self.result.command = order.narrowed, order.command
        self.entries: list[ItemInfo] = []
        self.found: dict[int, list[Finding]] = {}
        self.losses, self.most = 0, most

    def hear(self, part: _Part, message: Any) -> None:
        result = self.result
        match message:
            case Refused():
                raise message
            case Planned():
                result.candidate, result.accumulation, result.device = message.candidate, message.how, message.device
                self.entries = message.entries
            case Asking():
                part.at, part.compared = message.number, message.compared
            case Judged():
                self.found[message.number] = message.findings
            case Done():
                part.done = True
            case Fault():
                result.faults.append(message.what)
            case Lost():
                part.lost_for = message.reason

    def lost(self, part: _Part, ended: Ended) -> bool:
        """Note how a process ended; whether to ask on."""
        if part.done:
            return False
        self.losses += 1
        reason = part.lost_for or f"its process {ended}{' (--timeout)' if ended.over else ''}"
        if part.at is None:
            reason += " while the candidate was loaded and called for the first time"
            self.found[-1] = [Finding(LOADING, "the first call", "all", Status.FAIL, reason, 0, 0, trace=part.trace())]
            return bool(self.entries)  # it was loaded before
        entry = self.entries[part.at]
        lost = Finding(entry.checks[0], entry.case, "all", Status.FAIL, reason, 0, 0, id=entry.id, trace=part.trace())
        if part.compared and ended.from_outside and part.at not in self.found:
            self.result.faults.append(f"{entry.case}: {reason} while the reference was computed")
            self.found[part.at] = []
        else:
            self.found[part.at] = [lost]
        return bool(self.left)

    @property
    def goes_on(self) -> bool:
        """Whether few enough processes were lost."""
        return self.losses < self.most

    @property
    def left(self) -> list[int]:
        """Items not judged."""
        return [number for number in range(len(self.entries)) if number not in self.found]

    def close(self) -> None:
        """At the end: how much was not asked, and that torch's state was kept."""
        result = self.result
        result.findings = [finding for number in sorted(self.found) for finding in self.found[number]]
        if left := len(self.left):
            why = f"{self.losses} processes were lost" if not self.goes_on else "it stopped there"
            why = "it was interrupted" if result.interrupted else why
            result.left_out = f"{left} of {len(self.entries)} items were not asked: {why}."
        if result.findings and not any(finding.check == STATE.name for finding in result.findings):
            reason = "torch's global state is what it was before"
            result.findings.append(Finding(STATE.name, "every call", "all", Status.PASS, reason, 0, 0))
