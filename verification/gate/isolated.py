"""Judges a candidate in a process of its own: whatever becomes of that process, a verdict comes of it.

The process makes the candidate and the items from an order, and sends the findings of one item after the other. It is
ended when it takes too much processor time for one item, or is silent for too long. If it is lost, the item it was lost
in has failed, and another process goes on behind that item.
"""

from __future__ import annotations

import faulthandler
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mxref.verification.arithmetic.accumulation import Accumulation, default_accumulation
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.processes import Ended, Job, Limits, Pool, die_with_parent
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.checks.registry import STATE
from mxref.verification.gate.order import Order
from mxref.verification.gate.plan import Item, slopes_in
from mxref.verification.gate.result import GateResult, describe_device
from mxref.verification.gate.run import judge

__all__ = ["TIMEOUT", "Entry", "Refused", "judge_apart", "list_items"]

LOADING = "loading"
"""What findings are of before any check."""
TIMEOUT = 900.0
"""Seconds of processor time that one item may take unless told otherwise; a first compilation takes tens of seconds."""
_PATIENCE = 4.0
"""Silence by the clock, in units of that: a deadlock takes no processor time."""
_MOST_LOSSES = 3
"""Processes that may be lost before what is left is not asked."""


class Refused(ValueError):  # noqa: N818
    """The order cannot be carried out as it was given; the message says why."""


@dataclass(frozen=True)
class Entry:
    """One item as the asking process knows it: its identifier, its checks' names and its case's."""

    id: str
    checks: tuple[str, ...]
    case: str


@dataclass(frozen=True)
class _Planned:
    """What the process found before it asked anything; `candidate` without its callables, which stay there."""

    candidate: Candidate
    how: Accumulation
    device: str
    entries: list[Entry]


@dataclass(frozen=True)
class _Asking:
    """The candidate is being asked for an item; or, `compared`, has answered, and the reference is computed."""

    number: int
    compared: bool = False


@dataclass(frozen=True)
class _Judged:
    number: int
    findings: list[Finding]


@dataclass(frozen=True)
class _Fault:
    """A fault that is not the candidate's."""

    what: str


_DONE = "done"


def judge_apart(
    order: Order,
    *,
    suite: str,
    strict: bool = False,
    timeout: float = TIMEOUT,
    fail_fast: bool = False,
    on_item: Callable[[Entry, int, int], None] = lambda entry, done, total: None,
) -> GateResult:
    """Judge what is ordered.

    Args:
        order: what to judge, by what.
        suite: what to call it in the report.
        strict: see `GateResult.exit_code`.
        timeout: processor time that one item may take, in seconds.
        fail_fast: stop behind the first item that fails.
        on_item: called before each item with its number and the number of all.

    Raises:
        Refused: the order cannot be carried out: no such candidate, or nothing to ask.
    """
    start, run = time.monotonic(), _Run(order, suite, strict)
    limits = Limits(timeout, _PATIENCE * timeout)
    with TemporaryDirectory() as folder, Pool[Path](1, "spawn") as pool:
        pool.waiting.append(_job(order, 0, Path(folder) / "0", limits))
        for job, message in pool:
            if isinstance(message, Ended):
                if run.lost(message, _read(job.about)) and run.losses < _MOST_LOSSES:
                    pool.waiting.append(_job(order, run.at, Path(folder) / str(run.losses), limits))
                continue
            run.hear(message)
            if isinstance(message, _Asking) and not message.compared:
                on_item(run.entries[message.number], message.number, len(run.entries))
            if fail_fast and not all(finding.ok for finding in run.result.findings):
                break
    run.close()
    run.result.seconds = time.monotonic() - start
    return run.result


def list_items(order: Order) -> list[Entry]:
    """What the candidate would be asked.

    Raises:
        Refused: the order cannot be carried out, or the candidate ends the process that loads it.
    """
    with TemporaryDirectory() as folder, Pool[Path](1, "spawn") as pool:
        pool.waiting.append(_job(order, 0, Path(folder) / "0", Limits(TIMEOUT, _PATIENCE * TIMEOUT)))
        for _, message in pool:
            if isinstance(message, _Planned):
                return message.entries
            if isinstance(message, Refused | Ended):
                raise Refused(str(message))
    raise AssertionError("a process that is over has ended")


def _job(order: Order, first: int, crash: Path, limits: Limits) -> Job[Path]:
    return Job(crash, _work, (order, first, crash), limits)


class _Run:
    """What is known so far of one run, message by message.

    Attributes:
        result: findings so far.
        entries: what is asked.
        at: number of the next item to be asked, or of the one that is being asked.
        losses: processes that were lost.
    """

    def __init__(self, order: Order, suite: str, strict: bool) -> None:
        nobody = Candidate(order.kernel, _elsewhere)
        how = default_accumulation(torch.device("cpu"))
        self.result = GateResult(nobody, how, order.device_type, suite, order.seed, strict)
        self.result.narrowed, self.result.command = order.narrowed, order.command
        self.entries: list[Entry] = []
        self.at, self.losses = 0, 0
        self._compared, self._done = False, False

    def hear(self, message: Any) -> None:
        """Take a message in."""
        result = self.result
        if isinstance(message, Refused):
            raise message
        if isinstance(message, _Planned):
            result.candidate, result.accumulation, result.device = message.candidate, message.how, message.device
            self.entries = message.entries
        elif isinstance(message, _Asking):
            self.at, self._compared = message.number, message.compared
        elif isinstance(message, _Judged):
            result.findings += message.findings
            self.at, self._compared = message.number + 1, False
        elif isinstance(message, _Fault):
            result.faults.append(message.what)
        else:
            self._done = message == _DONE

    def lost(self, ended: Ended, crash: str) -> bool:
        """Note how the process ended; whether there is more to ask."""
        if self._done:
            return False
        self.losses += 1
        if not self.entries:
            reason = f"its process {_how(ended)} while the candidate was loaded and called for the first time"
            lost = Finding(LOADING, "the first call", "all", Status.FAIL, reason, 0, 0, trace=crash)
            self.result.findings.append(lost)
            return False
        entry = self.entries[self.at]
        if self._compared and ended.from_outside:
            self.result.faults.append(f"{entry.case}: the process {_how(ended)} while the reference was computed")
        else:
            reason = f"its process {_how(ended)}"
            lost = Finding(entry.checks[0], entry.case, "all", Status.FAIL, reason, 0, 0, id=entry.id, trace=crash)
            self.result.findings.append(lost)
        self.at += 1
        self._compared = False
        return self.at < len(self.entries)

    def close(self) -> None:
        """What is known at the end: how much was not asked, and that the state of torch was kept."""
        left = len(self.entries) - self.at
        if left > 0:
            why = f"{self.losses} processes were lost" if self.losses >= _MOST_LOSSES else "it stopped there"
            self.result.left_out = f"{left} of {len(self.entries)} items were not asked: {why}."
        if self.result.findings and not any(finding.check == STATE.name for finding in self.result.findings):
            reason = "torch's global state is what it was before"
            self.result.findings.append(Finding(STATE.name, "every call", "all", Status.PASS, reason, 0, 0))


def _how(ended: Ended) -> str:
    """How a process ended that should not have, in words."""
    if ended.over:
        by = "of processor time" if ended.over == "processor" else "by the clock"
        return f"hung: it said nothing for {ended.seconds:.0f} s {by} and was ended (--timeout)"
    if ended.code == -signal.SIGKILL:
        return "was killed (SIGKILL): by someone, or because memory ran out"
    if ended.code < 0:
        return f"crashed ({signal.Signals(-ended.code).name})"
    return f"ended itself with exit status {ended.code}"


def _read(crash: Path) -> str:
    """What the faulthandler wrote."""
    try:
        return crash.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _elsewhere(**operands: Any) -> Any:
    raise RuntimeError("the candidate's callables stay in its own process")


def _work(send: Callable[[Any], None], order: Order, first: int, crash: Path) -> None:
    """The process's own work: items from `first` on, a message before and after each."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the asking process is interrupted, and ends this one
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with crash.open("w") as file:
        faulthandler.enable(file, all_threads=False)
        try:
            candidate = order.candidate()
            items = order.items(candidate)
        except ValueError as error:
            send(Refused(str(error)))
            send(_DONE)
            return
        how = candidate.accumulation or default_accumulation(order.device)
        bare = replace(candidate, call=_elsewhere, decode=None, configs=None, operators=None)
        entries = [Entry(item.id, tuple(check.name for check in item.checks), item.name) for item in items]
        send(_Planned(bare, how, describe_device(order.device), entries))
        slopes = slopes_in(items)
        for number in range(first, len(items)):
            _judge(send, number, items[number], candidate, how, slopes)
            items[number] = replace(items[number])  # without its sample, which nobody needs any more
        send(_DONE)


def _judge(
    send: Callable[[Any], None], number: int, item: Item, candidate: Candidate, how: Accumulation, slopes: int
) -> None:
    """One item; what goes wrong on our side is told apart from what the candidate does."""
    send(_Asking(number))
    try:
        findings = judge(item, candidate, how, slopes, answered=lambda: send(_Asking(number, compared=True)))
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
    except Exception as error:
        send(_Fault(f"{item.checks[0].name}, {item.name}: {type(error).__name__}: {error} ({_place(error)})"))
        findings = []
    except BaseException as error:  # SIGINT is ignored here: a candidate raised it
        raised = Finding(item.checks[0].name, item.name, "all", Status.FAIL, f"raised {type(error).__name__}", 0, 0)
        findings = [item.named(raised)]
    send(_Judged(number, findings))


def _place(error: BaseException) -> str:
    """File and line where an error of ours was raised."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return "" if frame is None else f"{Path(frame.tb_frame.f_code.co_filename).name}, line {frame.tb_lineno}"
