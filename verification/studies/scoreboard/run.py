"""Who computes this layer right? Every implementation that can be found, judged by the same steps.

Each one runs in a process of its own, so that what a foreign kernel does to the GPU or to the interpreter's modules
hurts nobody else. A step that kills the process is that implementation's failure; the next step starts a new process.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import torch

from mxref.verification.arithmetic.accumulation import ACCUMULATIONS, Accumulation
from mxref.verification.candidates.candidate import Candidate, default_accumulation, describe
from mxref.verification.candidates.known import entry
from mxref.verification.cases import elements as exhaustive
from mxref.verification.cases import suites as cases
from mxref.verification.cases.case import Sample
from mxref.verification.cases.weights_behind import Weight, weight_at, witnesses
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.cli.options import matches
from mxref.verification.gate.plan import Step, suite_steps
from mxref.verification.gate.run import describe_device
from mxref.verification.studies.processes import Ended, Job, Limits, Pool

__all__ = ["Board", "Failure", "Row", "run_scoreboard"]

_SILENCE = 300.0
"""Seconds without a finished step after which a process counts as hung: compiling a kernel takes tens of them."""
_MOST_LOSSES = 3
"""Processes that one implementation may lose before its remaining steps are left out."""


@dataclass(frozen=True)
class Failure:
    """A failed judgement, and the packed weights behind its first counterexample where they are few."""

    finding: Finding
    weights: tuple[Weight, ...] = ()


@dataclass
class Row:
    """One implementation's line.

    Attributes:
        name: as in `entries`.
        about: what it is.
        package: the distribution that it comes from, with its version.
        unavailable: why nothing was judged; empty when it was.
        points: rounding points it is judged by; empty for the contract's.
        accumulation: the accumulation its bounds were derived for.
        findings: all of them.
        failures: those that failed, first of each guard and tensor in front.
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

    def counts(self, guard: str) -> Counter[Status]:
        """Findings of one guard by status."""
        return Counter(finding.status for finding in self.findings if finding.guard == guard)

    def first_failures(self) -> list[tuple[Failure, int]]:
        """The first failure of each guard and tensor, and how many there are of its kind."""
        groups: dict[tuple[str, str], list[Failure]] = {}
        for failure in self.failures:
            groups.setdefault((failure.finding.guard, failure.finding.tensor), []).append(failure)
        return [(group[0], len(group)) for group in groups.values()]


Answer = tuple[list[Finding], list[Failure]]
"""What one step found."""

OnStep = Callable[[str, int, int, str], None]


@dataclass
class Board:
    """The table, and where it comes from."""

    device: str
    suite: str
    seed: int
    only: tuple[str, ...] = ()
    rows: list[Row] = field(default_factory=list)
    started: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))

    def guards(self) -> list[str]:
        """Guards that judged anything, in their order."""
        return list(dict.fromkeys(finding.guard for row in self.rows for finding in row.findings))


@dataclass(frozen=True)
class _Job:
    """Every `of`-th step of one implementation, from `first` on."""

    name: str
    device: str
    full: bool
    seed: int
    only: tuple[str, ...]
    of: int
    first: int

    def steps(self) -> dict[int, Step]:
        """The steps by number."""
        every = suite_steps(torch.device(self.device), self.full, self.seed, every_guard=True)
        chosen = [step for step in every if matches(step.case, self.only)]
        return {number: chosen[number] for number in range(self.first, len(chosen), self.of)}


def run_scoreboard(
    names: Sequence[str],
    device: torch.device,
    *,
    full: bool,
    seed: int,
    only: Sequence[str] = (),
    processes: int = 1,
    on_step: OnStep = lambda name, done, total, case: None,
) -> Board:
    """Judge each implementation in turn.

    Args:
        names: see `entries.entry`.
        device: where.
        full: the release suite instead of the quick one.
        seed: of every draw.
        only: cases that match one of these patterns; empty for all.
        processes: that share one implementation's steps; compiling its kernels is what takes the time.
        on_step: called with the name, finished steps, all steps and a case that has just been judged.
    """
    board = Board(describe_device(device), "full" if full else "quick", seed, tuple(only))
    for name in names:
        who, start = entry(name), time.monotonic()
        row = Row(name, who.about, f"{who.package} {who.version()}".strip())
        board.rows.append(row)
        if device.type in who.devices:
            jobs = [_Job(name, device.type, full, seed, tuple(only), processes, first) for first in range(processes)]
            _judge(row, jobs, on_step)
        else:
            row.unavailable = f"needs {' or '.join(who.devices)}" if who.version() else "not installed"
        row.seconds = time.monotonic() - start
    return board


def _judge(row: Row, jobs: Sequence[_Job], on_step: OnStep) -> None:
    """Run one implementation's jobs side by side, and put their answers into the steps' order."""
    answers: dict[int, Answer] = {}
    total = sum(len(job.steps()) for job in jobs)

    def answered(number: int, answer: Answer) -> None:
        answers[number] = answer
        on_step(row.name, len(answers), total, answer[0][-1].case if answer[0] else "")

    on_step(row.name, 0, total, "")
    with Pool[_Progress](len(jobs), "spawn") as pool:
        pool.waiting.extend(_start(_Progress(job, deque(job.steps()))) for job in jobs)
        for job, said in pool:
            if isinstance(said, Ended):
                pool.waiting.extend(_go_on(job.about, said, answered))
            elif isinstance(said, _Unavailable):
                row.unavailable = said.reason
                job.about.waiting.clear()
            elif isinstance(said, _Declared):
                row.points, row.accumulation = said.points, said.accumulation
            elif isinstance(said, _Lost):
                job.about.loss = said.reason
            else:
                answered(job.about.waiting.popleft(), said)
    for number in sorted(answers):
        findings, failures = answers[number]
        row.findings += findings
        row.failures += failures


@dataclass
class _Progress:
    """A job: the steps that it has not answered, the processes that it has lost, and why the last one is lost."""

    job: _Job
    waiting: deque[int]
    losses: int = 0
    loss: str = ""


def _start(progress: _Progress) -> Job[_Progress]:
    """A process for what is left of a job."""
    job = replace(progress.job, first=progress.waiting[0])
    return Job(progress, _work, (job,), Limits(silence=_SILENCE))


def _go_on(progress: _Progress, ended: Ended, answered: Callable[[int, Answer], None]) -> list[Job[_Progress]]:
    """Once a process has ended: its step is the implementation's failure if it was lost, another process goes on."""
    if not progress.waiting:
        return []
    steps, lost = progress.job.steps(), progress.waiting.popleft()
    loss = progress.loss or (
        f"no answer in {_SILENCE:.0f} s" if ended.over else f"its process ended with code {ended.code}"
    )
    finding = Finding(steps[lost].guard, steps[lost].case, "all", Status.FAIL, loss, 0, 0)
    answered(lost, ([finding], [Failure(finding)]))
    progress.losses, progress.loss = progress.losses + 1, ""
    if progress.losses < _MOST_LOSSES:
        return [_start(progress)] if progress.waiting else []
    reason = f"not run: {_MOST_LOSSES} processes were lost before"
    for number in progress.waiting:
        missing = Finding(steps[number].guard, steps[number].case, "all", Status.NOT_COVERED, reason, 0, 0)
        answered(number, ([missing], []))
    return []


@dataclass(frozen=True)
class _Unavailable:
    """An implementation cannot be made here."""

    reason: str


@dataclass(frozen=True)
class _Declared:
    """What an implementation declares, before its first step."""

    points: tuple[str, ...]
    accumulation: str


@dataclass(frozen=True)
class _Lost:
    """A process cannot go on."""

    reason: str


def _work(send: Callable[[_Unavailable | _Declared | _Lost | Answer], None], job: _Job) -> None:
    """What a process does: one message a step. Ends early when the GPU no longer answers."""
    device, who = torch.device(job.device), entry(job.name)
    try:
        candidate = who.make(device)
    except (ImportError, ValueError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == who.package
        send(_Unavailable("not installed" if missing else str(error)))
        return
    how = candidate.accumulation or ACCUMULATIONS[default_accumulation(device)]
    send(_Declared(tuple(candidate.declared_points), describe(how)))
    if not candidate.complete:  # what was read in foreign code is tried first; the order-free bound is a second chance
        candidate = replace(candidate, accumulation=None)
    for step in job.steps().values():
        try:
            answer = _judge_step(candidate, step, how, job)
            if device.type == "cuda":
                torch.cuda.synchronize()
        except RuntimeError as error:  # a guard never raises: only a GPU that no longer answers comes here
            send(_Lost(f"its process could not go on: {str(error).splitlines()[0]}"))
            return
        send(answer)


def _judge_step(candidate: Candidate, step: Step, how: Accumulation, job: _Job) -> Answer:
    findings, _ = step.judge(candidate, how)
    failures, seen = [], set[str]()
    for finding in findings:
        if finding.status is Status.FAIL:
            failures.append(Failure(finding, () if finding.tensor in seen else _weights(finding, job)))
            seen.add(finding.tensor)
    return findings, failures


def _weights(finding: Finding, job: _Job) -> tuple[Weight, ...]:
    """The packed weights behind a counterexample; drawn again on the CPU, which gives the same numbers."""
    example = finding.counterexample
    if example is None or finding.guard not in ("decode", "integer"):
        return ()
    if finding.tensor == "W":
        expert, n, k = example.coordinate
        return (weight_at(exhaustive.all_elements(), expert, k, n),)
    sample = _sample(finding, job)
    return () if sample is None else tuple(witnesses(sample, finding.tensor, example.coordinate))


def _sample(finding: Finding, job: _Job) -> Sample | None:
    if finding.guard == "integer":
        found = [case for case in cases.integer_cases(job.device) if case.name == finding.case]
        return found[0].build("cpu", job.seed) if found else None
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if finding.case.endswith(str(dtype).removeprefix("torch.")):
            samples = (exhaustive.finite_sample(dtype, "cpu"), *exhaustive.nonfinite_samples(dtype, "cpu"))
            return next((sample for sample in samples if sample.case.name == finding.case), None)
    return None
