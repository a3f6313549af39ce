"""Who computes this layer right? Every implementation that can be found, judged by the same checks.

Each one runs in a process of its own, so that what a foreign kernel does to the GPU or to the interpreter's modules
hurts nobody else. An item that kills the process is that implementation's failure; the next one starts a new process.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import torch

from mxref.verification.arithmetic.accumulation import Accumulation, default_accumulation
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.known import OWN, entry
from mxref.verification.cases.case import Sample
from mxref.verification.cases.elements import all_elements
from mxref.verification.cases.scope import Scope, Suite
from mxref.verification.cases.weights_behind import Weight, weight_at, weights_behind
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.gate.plan import Item, plan, slopes_in
from mxref.verification.gate.result import describe_device
from mxref.verification.gate.run import judge

__all__ = ["Board", "Failure", "Row", "run_scoreboard"]

_SILENCE = 300.0
"""Seconds without a finished item after which a process counts as hung: compiling a kernel takes tens of them."""
_MOST_LOSSES = 3
"""Processes that one implementation may lose before its remaining items are left out."""


@dataclass(frozen=True)
class Failure:
    """A failed judgement, and the packed weights behind its first counterexample where they are few."""

    finding: Finding
    weights: tuple[Weight, ...] = ()


@dataclass
class Row:
    """One implementation's line.

    Attributes:
        name: as in `candidates.known`.
        about: what it is.
        package: the distribution that it comes from, with its version.
        unavailable: why nothing was judged; empty when it was.
        points: rounding points it is judged by; empty for the contract's.
        accumulation: the accumulation its bounds were derived for.
        findings: all of them.
        failures: those that failed, first of each check and tensor in front.
        seconds: wall-clock time of its processes.
    """

    name: str
    about: str = ""
    package: str = ""
    unavailable: str = ""
    points: tuple[str, ...] = ()
    accumulation: str = ""
    findings: list[Finding] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0

    def counts(self, check: str) -> Counter[Status]:
        """Findings of one check by status."""
        return Counter(finding.status for finding in self.findings if finding.check == check)

    def first_failures(self) -> list[tuple[Failure, int]]:
        """The first failure of each check and tensor, and how many there are of its kind."""
        groups: dict[tuple[str, str], list[Failure]] = {}
        for failure in self.failures:
            groups.setdefault((failure.finding.check, failure.finding.tensor), []).append(failure)
        return [(group[0], len(group)) for group in groups.values()]


Answer = tuple[list[Finding], list[Failure]]
"""What one item found."""

OnItem = Callable[[str, int, int, str], None]


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
        """Guards that judged anything, in their order."""
        return list(dict.fromkeys(finding.check for row in self.rows for finding in row.findings))


@dataclass(frozen=True)
class _Job:
    """Every `of`-th item of one implementation, from `first` on."""

    name: str
    device: str
    full: bool
    seed: int
    only: tuple[str, ...]
    of: int
    first: int

    def items(self) -> dict[int, Item]:
        """The items by number."""
        suite: Suite = "full" if self.full else "quick"
        every = plan(Scope(suite, self.device, self.seed, self.name == OWN), own=self.name == OWN)
        chosen = [item for item in every if item.fits(self.only)]
        return {number: chosen[number] for number in range(self.first, len(chosen), self.of)}


def run_scoreboard(
    names: Sequence[str],
    device: torch.device,
    *,
    full: bool,
    seed: int,
    only: Sequence[str] = (),
    processes: int = 1,
    on_item: OnItem = lambda name, done, total, case: None,
) -> Board:
    """Judge each implementation in turn.

    Args:
        names: see `candidates.known.entry`.
        device: where.
        full: the release suite instead of the quick one.
        seed: of every draw.
        only: cases, or checks, that match one of these patterns; empty for all.
        processes: that share one implementation's items; compiling its kernels is what takes the time.
        on_item: called with the name, finished items, all items and a case that has just been judged.
    """
    board = Board(describe_device(device), "full" if full else "quick", seed, tuple(only))
    for name in names:
        who, start = entry(name), time.monotonic()
        row = Row(name, who.about, f"{who.package} {who.version()}".strip())
        board.rows.append(row)
        if device.type in who.devices:
            jobs = [_Job(name, device.type, full, seed, tuple(only), processes, first) for first in range(processes)]
            _judge(row, jobs, on_item)
        else:
            row.unavailable = f"needs {' or '.join(who.devices)}" if who.version() else "not installed"
        row.seconds = time.monotonic() - start
    return board


def _judge(row: Row, jobs: Sequence[_Job], on_item: OnItem) -> None:
    """Run one implementation's jobs side by side, and put their answers into the items' order."""
    answers: dict[int, Answer] = {}
    total = sum(len(job.items()) for job in jobs)

    def answered(number: int, answer: Answer) -> None:
        answers[number] = answer
        on_item(row.name, len(answers), total, answer[0][-1].case if answer[0] else "")

    on_item(row.name, 0, total, "")
    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(lambda job: _finish(row, job, answered), jobs))
    for number in sorted(answers):
        findings, failures = answers[number]
        row.findings += findings
        row.failures += failures


def _finish(row: Row, job: _Job, answered: Callable[[int, Answer], None]) -> None:
    """Run a job, in another process after each that is lost."""
    for _ in range(_MOST_LOSSES):
        items = job.items()
        lost, loss = _one_process(row, job, list(items), answered)
        if row.unavailable or lost is None:
            return
        finding = Finding(items[lost].checks[0].name, items[lost].name, "all", Status.FAIL, loss, 0, 0)
        answered(lost, ([finding], [Failure(finding)]))
        job = replace(job, first=lost + job.of)
    reason = f"not run: {_MOST_LOSSES} processes were lost before"
    for number, item in job.items().items():
        answered(number, ([Finding(item.checks[0].name, item.name, "all", Status.NOT_COVERED, reason, 0, 0)], []))


def _one_process(
    row: Row, job: _Job, numbers: Sequence[int], answered: Callable[[int, Answer], None]
) -> tuple[int | None, str]:
    """One process for all of a job's items: the item that it was lost in, if it was, and what happened."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, sender), daemon=True)
    process.start()
    sender.close()  # this process's copy: the end of the other one is then the end of the messages
    waiting = list(numbers)
    try:
        while waiting:
            if not receiver.poll(_SILENCE):
                return waiting[0], f"no answer in {_SILENCE:.0f} s"
            try:
                kind, content = receiver.recv()
            except (EOFError, OSError):
                process.join()
                return waiting[0], f"its process ended with code {process.exitcode}"
            if kind == "lost":
                return waiting[0], content
            if kind == "unavailable":
                row.unavailable = content
                return None, ""
            if kind == "declared":
                row.points, row.accumulation = content
            else:
                answered(waiting.pop(0), content)
        return None, ""
    finally:
        process.join(5.0)
        if process.is_alive():
            process.kill()


def _work(job: _Job, messages: Any) -> None:
    """What a process does: one message an item, sent before the next begins. Ends when the GPU no longer answers."""
    device, who = torch.device(job.device), entry(job.name)
    try:
        candidate = who.make(device)
    except (ImportError, ValueError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == who.package
        messages.send(("unavailable", "not installed" if missing else str(error)))
        return
    how = candidate.accumulation or default_accumulation(device)
    messages.send(("declared", (candidate.declared_points, str(how))))
    if not candidate.complete:  # what was read in foreign code is tried first; the order-free bound is a second chance
        candidate = replace(candidate, accumulation=None)
    items = job.items()
    slopes = slopes_in([*replace(job, of=1, first=0).items().values()])
    for item in items.values():
        try:
            answer = _judge_item(candidate, item, how, slopes)
            if device.type == "cuda":
                torch.cuda.synchronize()
        except RuntimeError as error:  # a check never raises: only a GPU that no longer answers comes here
            messages.send(("lost", f"its process could not go on: {str(error).splitlines()[0]}"))
            return
        messages.send(("item", answer))


def _judge_item(candidate: Candidate, item: Item, how: Accumulation, slopes: int) -> Answer:
    failures, seen = [], set[str]()
    findings = [replace(finding, picture=None) for finding in judge(item, candidate, how, slopes)]
    for finding in findings:
        if finding.status is Status.FAIL:
            failures.append(Failure(finding, () if finding.tensor in seen else _weights(finding, item)))
            seen.add(finding.tensor)
    return findings, failures


def _weights(finding: Finding, item: Item) -> tuple[Weight, ...]:
    """The packed weights behind a counterexample, where they are few."""
    example, sample = finding.counterexample, item.sample
    if example is None or not isinstance(sample, Sample) or not sample.case.exact:
        return ()
    if finding.tensor == "W":
        expert, n, k = example.coordinate
        return (weight_at(all_elements(), expert, k, n),)
    return tuple(weights_behind(sample.to("cpu"), finding.tensor, example.coordinate))
