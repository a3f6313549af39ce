"""Judges the planted bugs as any foreign candidate: the quick plan on a CPU, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mxref.verification.arithmetic.accumulation import default_accumulation
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.own_code import OwnCode
from mxref.verification.candidates.probe import call_first
from mxref.verification.candidates.processes import Ended, Job, Limits, Pool
from mxref.verification.cases.case import Case
from mxref.verification.cases.scope import Scope
from mxref.verification.checks.registry import CHECKS
from mxref.verification.gate.plan import Item, plan
from mxref.verification.gate.run import judge
from mxref.verification.studies.calls.layer import Bug, Layer

__all__ = ["HONEST", "Judged", "NotHonestError", "judge_bugs", "payload"]

HONEST = Bug("honest", "makes no mistake: whatever rejects it is wrong itself", (), Layer)
"""The layer without a bug, judged first."""

_LIMITS = Limits(processor=600.0, silence=600.0)


class NotHonestError(AssertionError):
    """A check rejects the layer that has no bug, so its kills count for nothing."""


@dataclass(frozen=True)
class Judged:
    """What became of a bug.

    Attributes:
        bug: which.
        check: the first that rejected it; "" for a survivor.
        finding: in words.
    """

    bug: Bug
    check: str = ""
    finding: str = ""

    @property
    def killed(self) -> bool:
        """Whether a check rejected it."""
        return bool(self.check)


def judge_bugs(
    bugs: Sequence[Bug], seed: int, jobs: int, on_judged: Callable[[Judged], None] = lambda judged: None
) -> list[Judged]:
    """Every bug against the plan of a foreign candidate in plain PyTorch, until a check rejects it; in their order.

    Raises:
        NotHonestError: a check rejects the layer without a bug.
    """
    items = plan(Scope("quick", "cpu", seed, interpreted=False), own=False)
    found: dict[str, Judged] = {}
    with Pool[Bug](jobs, "fork") as pool:
        pool.waiting.extend(Job(bug, _judge, (bug, items), _LIMITS) for bug in (HONEST, *bugs))
        for job, said in pool:
            bug = job.about
            if isinstance(said, Ended) and (said.well or bug.name in found):
                continue
            found[bug.name] = judged = Judged(bug, *(("process", str(said)) if isinstance(said, Ended) else said))
            if bug is not HONEST:
                on_judged(judged)
            elif judged.killed:
                raise NotHonestError(f"the honest layer is rejected: {judged.finding}")
    return [found[bug.name] for bug in bugs]


def _judge(say: Callable[[Any], None], bug: Bug, items: Sequence[Item]) -> None:
    """In a child: says the first rejection, as the fields of `Judged` behind the bug."""
    torch.set_num_threads(1)
    device, code = torch.device("cpu"), OwnCode.now()
    candidate, how = Candidate(bug.name, bug.make()), default_accumulation(device)
    call_first(candidate, device)
    for item in sorted(items, key=lambda item: _shows(item, bug), reverse=True):
        rejected = next((finding for finding in judge(item, candidate, how, code=code) if not finding.ok), None)
        if rejected is not None:
            say((rejected.check, str(rejected)))
            return
    say(())


def _shows(item: Item, bug: Bug) -> bool:
    """Whether an item should show a bug, so that it is asked first: the classes say so, or that there are none."""
    return set(bug.shown_by) <= set(_covers(item)) if bug.shown_by else not _covers(item)


def _covers(item: Item) -> tuple[tuple[str, str], ...]:
    return item.case.covers if isinstance(item.case, Case) else ()


def payload(judged: Sequence[Judged], seed: int) -> dict[str, Any]:
    """What to keep of a run, as plain data; a bug a row."""
    return {
        "passed": all(each.killed for each in judged),
        "seed": seed,
        "killed": sum(each.killed for each in judged),
        "survived": sum(not each.killed for each in judged),
        "kills by check": dict(_counted(judged)),
        "bugs": [
            {
                "name": each.bug.name,
                "mistake": each.bug.mistake,
                "shown by": ", ".join(f"{dimension}: {name}" for dimension, name in each.bug.shown_by),
                "check": each.check,
                "finding": each.finding,
            }
            for each in judged
        ],
    }


def _counted(judged: Sequence[Judged]) -> Iterator[tuple[str, int]]:
    """Kills of each check, in the checks' order."""
    for name in (*(check.name for check in CHECKS), "state", "process"):
        if count := sum(each.check == name for each in judged):
            yield name, count
