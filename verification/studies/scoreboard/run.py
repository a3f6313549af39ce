"""Who computes this layer right? Every implementation that can be found, judged by the same checks.

Each one runs in a process of its own, so that what a foreign kernel does to the GPU or to the interpreter's modules
hurts nobody else. An item that kills the process is that implementation's failure; the next one starts a new process.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import torch

from mxref.verification.arithmetic.accumulation import Accumulation, default_accumulation
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.known import OWN, entry
from mxref.verification.candidates.processes import Ended, Job, Limits, Pool
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
"""Seconds, computing or waiting, without a finished item after which a process counts as hung: compiling takes tens."""
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
    parts = [_Part(job, job.items()) for job in jobs]
    total = sum(len(part.left) for part in parts)

    def answered(number: int, answer: Answer) -> None:
        answers[number] = answer
        on_item(row.name, len(answers), total, answer[0][-1].case if answer[0] else "")

    on_item(row.name, 0, total, "")
    with Pool[_Part](len(jobs), "spawn") as pool:
        pool.waiting.extend(part.process() for part in parts if part.left)
        for job, said in pool:
            part = job.about
            match said:
                case Ended():
                    part.lose(said, answered)
                    pool.waiting.extend([part.process()] if part.left else [])
                case _Unavailable():
                    row.unavailable = said.reason
                    part.left.clear()
                case _Declared():
                    row.points, row.accumulation = said.points, said.accumulation
                case _Lost():
                    part.lost_for = said.reason
                case _:
                    answered(part.take()[0], said)
    for number in sorted(answers):
        findings, failures = answers[number]
        row.findings += findings
        row.failures += failures


@dataclass(frozen=True)
class _Unavailable:
    """The implementation cannot be made here."""

    reason: str


@dataclass(frozen=True)
class _Declared:
    """What the implementation declares, before its first item."""

    points: tuple[str, ...]
    accumulation: str


@dataclass(frozen=True)
class _Lost:
    """The process cannot go on."""

    reason: str


@dataclass
class _Part:
    """A job, its items that are not answered yet, how many processes it has lost, and why the last one says it is."""

    job: _Job
    left: dict[int, Item]
    losses: int = 0
    lost_for: str = ""

    def process(self) -> Job[_Part]:
        """A process for what is left."""
        return Job(self, _work, (replace(self.job, first=min(self.left)),), Limits(_SILENCE, _SILENCE))

    def take(self) -> tuple[int, Item]:
        """The next item, which then is no longer left."""
        number = min(self.left)
        return number, self.left.pop(number)

    def lose(self, ended: Ended, answered: Callable[[int, Answer], None]) -> None:
        """A process has ended. The item that it was lost in fails; after too many losses nothing more is asked."""
        if not self.left:
            return
        self.losses += 1
        number, item = self.take()
        died = f"no answer in {_SILENCE:.0f} s" if ended.over else f"its process ended with code {ended.code}"
        finding = _about(item, Status.FAIL, self.lost_for or died)
        answered(number, ([finding], [Failure(finding)]))
        while self.left and self.losses == _MOST_LOSSES:
            number, item = self.take()
            reason = f"not run: {_MOST_LOSSES} processes were lost before"
            answered(number, ([_about(item, Status.NOT_COVERED, reason)], []))
        self.lost_for = ""


def _about(item: Item, status: Status, reason: str) -> Finding:
    return Finding(item.checks[0].name, item.name, "all", status, reason, 0, 0)


def _work(send: Callable[[_Unavailable | _Declared | _Lost | Answer], None], job: _Job) -> None:
    """What a process does: one message an item. Ends early when the GPU no longer answers."""
    device, who = torch.device(job.device), entry(job.name)
    try:
        candidate = who.make(device)
    except (ImportError, ValueError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == who.package
        send(_Unavailable("not installed" if missing else str(error)))
        return
    how = candidate.accumulation or default_accumulation(device)
    send(_Declared(candidate.declared_points, str(how)))
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
            send(_Lost(f"its process could not go on: {str(error).splitlines()[0]}"))
            return
        send(answer)


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
