"""Who computes this layer right? Every implementation that can be found, judged by the same steps.

Each one runs in a process of its own, so that what a foreign kernel does to the GPU or to the interpreter's modules
hurts nobody else. A step that kills the process is that implementation's failure; the next step starts a new process.
"""

from __future__ import annotations

import multiprocessing
import queue
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import torch

from mxref.verification import cases, exhaustive
from mxref.verification.accumulation import ACCUMULATIONS, Accumulation
from mxref.verification.candidates import Candidate, default_accumulation, describe
from mxref.verification.entries import entry
from mxref.verification.gate import Step, describe_device, suite_steps
from mxref.verification.options import matches
from mxref.verification.sampling import Sample
from mxref.verification.verdicts import Finding, Status
from mxref.verification.witness import Weight, weight_at, witnesses

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
    name: str
    device: str
    full: bool
    seed: int
    only: tuple[str, ...]
    first_step: int = 0

    def steps(self) -> list[Step]:
        every = suite_steps(torch.device(self.device), self.full, self.seed)
        return [step for step in every if matches(step.case, self.only)]


def run_scoreboard(
    names: Sequence[str],
    device: torch.device,
    *,
    full: bool,
    seed: int,
    only: Sequence[str] = (),
    on_step: Callable[[str, int, int, str], None] = lambda name, done, total, case: None,
) -> Board:
    """Judge each implementation in turn.

    Args:
        names: see `entries.entry`.
        device: where.
        full: the release suite instead of the quick one.
        seed: of every draw.
        only: cases that match one of these patterns; empty for all.
        on_step: called with the name, finished steps, all steps and the case about to run.
    """
    board = Board(describe_device(device), "full" if full else "quick", seed, tuple(only))
    for name in names:
        who, start = entry(name), time.monotonic()
        row = Row(name, who.about, f"{who.package} {who.version()}".strip())
        board.rows.append(row)
        if device.type in who.devices:
            _judge(row, _Job(name, device.type, full, seed, tuple(only)), on_step)
        else:
            row.unavailable = (
                f"needs {' or '.join(who.devices)}" if who.version() else f"{who.package} is not installed"
            )
        row.seconds = time.monotonic() - start
    return board


def _judge(row: Row, job: _Job, on_step: Callable[[str, int, int, str], None]) -> None:
    """Run an implementation's processes until all steps are done."""
    steps = job.steps()
    for _ in range(_MOST_LOSSES):
        done, loss = _one_process(row, job, steps, on_step)
        if row.unavailable or done == len(steps):
            return
        finding = Finding(steps[done].guard, steps[done].case, "all", Status.FAIL, loss, 0, 0)
        row.findings.append(finding)
        row.failures.append(Failure(finding))
        job = replace(job, first_step=done + 1)
    reason = f"not run: {_MOST_LOSSES} processes were lost before"
    row.findings += [Finding(s.guard, s.case, "all", Status.NOT_COVERED, reason, 0, 0) for s in steps[job.first_step :]]


def _one_process(
    row: Row, job: _Job, steps: Sequence[Step], on_step: Callable[[str, int, int, str], None]
) -> tuple[int, str]:
    """One process from `job.first_step` on: the steps done when it ended, and what ended it too early."""
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    process = context.Process(target=_work, args=(job, answers), daemon=True)
    process.start()
    done, patience = job.first_step, _SILENCE
    try:
        while done < len(steps):
            on_step(row.name, done, len(steps), steps[done].case)
            try:
                kind, answer = answers.get(timeout=min(patience, 1.0))
            except queue.Empty:
                patience -= 1.0
                if patience <= 0:
                    return done, f"no answer in {_SILENCE:.0f} s"
                if not process.is_alive() and answers.empty():
                    return done, f"its process ended with code {process.exitcode}"
                continue
            patience = _SILENCE
            if kind == "lost":
                return done, answer
            if kind == "unavailable":
                row.unavailable = answer
                return done, answer
            if kind == "declared":
                row.points, row.accumulation = answer
                continue
            findings, failures = answer
            row.findings += findings
            row.failures += failures
            done += 1
        return done, ""
    finally:
        process.join(5.0)
        if process.is_alive():
            process.kill()


def _work(job: _Job, answers: Any) -> None:
    """What a process does: one answer a step. Ends early when the GPU no longer answers."""
    device = torch.device(job.device)
    who = entry(job.name)
    try:
        candidate = who.make(device)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == who.package
        answers.put(("unavailable", f"{who.package} is not installed" if missing else str(error)))
        return
    how = candidate.accumulation or ACCUMULATIONS[default_accumulation(device)]
    answers.put(("declared", (candidate.declared_points, describe(how))))
    if candidate.complete:
        judged = candidate
    else:  # what was read in foreign code is tried first; the order-free bound stays a second chance
        judged = replace(candidate, accumulation=None)
    for step in job.steps()[job.first_step :]:
        try:
            answer = _judge_step(judged, step, how, job)
            if device.type == "cuda":
                torch.cuda.synchronize()
        except RuntimeError as error:  # a guard never raises: only a GPU that no longer answers comes here
            answers.put(("lost", f"its process could not go on: {str(error).splitlines()[0]}"))
            return
        answers.put(("step", answer))


def _judge_step(candidate: Candidate, step: Step, how: Accumulation, job: _Job) -> tuple[list[Finding], list[Failure]]:
    findings, _ = step.judge(candidate, how)
    failed = [finding for finding in findings if finding.status is Status.FAIL]
    return findings, [Failure(finding, _weights(finding, job)) for finding in failed]


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
