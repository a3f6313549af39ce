"""Asks a step about a case in a world, and judges what its ranks answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mxref.verification.checks.finding import Finding, Status
from mxref.verification.distributed.cases import StepCase
from mxref.verification.distributed.checks import Answers
from mxref.verification.distributed.expected import Expected
from mxref.verification.distributed.fixtures import draw, shared
from mxref.verification.distributed.protocol import Declared
from mxref.verification.distributed.questions import Describe, Groups, MakeStep, Read, Train
from mxref.verification.distributed.ranks import Raised
from mxref.verification.distributed.registry import CHECKS, ENDS
from mxref.verification.distributed.world import Lost, World, innermost

__all__ = ["NoStepError", "describe", "judge"]


class NoStepError(ValueError):
    """There is no such step, or what it declares is not understood; the message says why."""


def describe(world: World, make: MakeStep) -> Declared:
    """What a step declares.

    Raises:
        NoStepError: a rank cannot make it, or does not understand its declaration.
    """
    answers = world.ask([Describe(make)] * world.size)
    for answer in answers:
        if isinstance(answer, Raised):
            raise NoStepError(answer.what)
        if isinstance(answer, Lost):
            raise NoStepError(f"the process that loads it {answer.how}")
    first = answers[0]
    assert isinstance(first, Declared)
    return first


def judge(world: World, make: MakeStep, declared: Declared, case: StepCase, seed: int) -> list[Finding]:
    """What the checks find; nothing where the world cannot be dealt to the case's groups, or the step leaves it out.

    After a failure the next case gets groups of its own: what a step has left in them must not meet it.
    """
    ranks = case.dealt(world.size)
    if ranks is None or _left_out(case, declared, len(ranks[0])):
        return []
    groups, expected = Groups(ranks, world.failures), _expected(case, seed, declared, case.groups, world.size)
    with TemporaryDirectory() as folder:
        findings = _findings(world, make, groups, expected, Path(folder))
    world.failures += not all(finding.ok for finding in findings)
    return findings


def _left_out(case: StepCase, declared: Declared, ranks: int) -> bool:
    """Whether a step declares that it does not support a case; `ranks`: of a group."""
    few = "experts>=ranks" in declared.covers and case.experts < ranks
    rounds = not case.exact and case.dtype != torch.float32
    side_by_side = "one group" in declared.covers and case.groups > 1
    return few or side_by_side or ("rounded in fp32" in declared.covers and rounds)


@cache
def _expected(case: StepCase, seed: int, declared: Declared, groups: int, ranks: int) -> list[Expected]:
    """One a group, each of a draw of its own."""
    shares = tuple(case.share(ranks // groups))
    return [Expected(draw(case, seed + number, declared), shares, declared) for number in range(groups)]


def _findings(
    world: World, make: MakeStep, groups: Groups, expected: Sequence[Expected], folder: Path
) -> list[Finding]:
    case, ranks = expected[0].fixture.case, range(world.size)
    name = f"{case.name}, {world.size} {'rank' if world.size == 1 else 'ranks'}"
    first, second = folder / "first", folder / "again"
    trained = world.ask(_questions(make, groups, expected, first))
    again, saved, found = list[Any](), list[Any](), _ended(name, trained)
    if found.ok and case.repeat:
        again = world.ask(_questions(make, groups, expected, second))
        found = _ended(name, again)
    if found.ok and expected[0].declared.saves:
        saved = world.ask([Read(make, first / str(groups.of(rank))) for rank in ranks])
        found = _ended(name, saved)
    if not found.ok:
        return [found]
    findings = [found]
    for members, own in zip(groups.ranks, expected, strict=True):
        of_group = [[answers[rank] for rank in members] if answers else [] for answers in (trained, again, saved)]
        answers = Answers(name, own, *of_group)
        for check in CHECKS:
            if check.asked(answers):
                findings += [replace(finding, check=check.name) for finding in check.compare(answers)]
    return findings


def _questions(make: MakeStep, groups: Groups, expected: Sequence[Expected], folder: Path) -> list[Train]:
    """What each rank of the world is asked."""
    questions: dict[int, Train] = {}
    for number, (members, own) in enumerate(zip(groups.ranks, expected, strict=True)):
        place = folder / str(number)
        place.mkdir(parents=True)
        parts = [shared(batch, own.shares) for batch in own.fixture.batches]
        for rank, batches in zip(members, zip(*parts, strict=True), strict=True):
            questions[rank] = Train(make, own.fixture.model, tuple(batches), groups, place)
    return [questions[rank] for rank in sorted(questions)]


def _ended(name: str, answers: Sequence[Any]) -> Finding:
    """Whether every rank came back: who did not is named, and who caused it first."""
    raised = {rank: answer for rank, answer in enumerate(answers) if isinstance(answer, Raised)}
    lost = {rank: answer for rank, answer in enumerate(answers) if isinstance(answer, Lost)}
    if not raised and not lost:
        return Finding(ENDS.name, name, "all", Status.PASS, "every rank came back", len(answers), 0)
    died = {rank: each for rank, each in lost.items() if "waited" not in each.how}  # they are the cause
    said: dict[str, list[int]] = {}
    caused: dict[int, Raised | Lost] = {**died, **raised, **lost}
    for rank, each in caused.items():
        how = f"raised {each.what}" if isinstance(each, Raised) else f"{each.how}{_at(each.trace)}"
        said.setdefault(how, []).append(rank)
    back = [rank for rank in range(len(answers)) if rank not in raised and rank not in lost]
    if back:
        said["came back"] = back
    reason = "; ".join(f"{_named(ranks)} {what}" for what, ranks in said.items())
    trace = next((each.trace for each in caused.values() if each.trace), "")
    count = len(raised) + len(lost)
    return Finding(ENDS.name, name, "all", Status.FAIL, reason, len(answers), count, trace=trace)


def _at(trace: str) -> str:
    frame = innermost(trace)
    return f" (at {frame})" if frame else ""


def _named(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
