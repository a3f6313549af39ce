"""Judges planted mistakes, each where it must show, and honest steps everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mxref.verification.candidates.processes import Limits
from mxref.verification.checks.finding import Finding
from mxref.verification.distributed.cases import CASES
from mxref.verification.distributed.judging import describe, judge
from mxref.verification.distributed.world import LIMITS, World
from mxref.verification.studies.steps.fault import Fault
from mxref.verification.studies.steps.honest import Runtime

__all__ = ["WAIT", "Judged", "judge_faults", "judge_honest", "payload"]

WAIT = Limits(LIMITS.processor, 3.0)
"""For planted mistakes: ranks that use no processor time for this long wait for each other."""


@dataclass(frozen=True)
class Judged:
    """What became of a planted mistake: what the check that must name it found first, or nothing, and what else did."""

    fault: Fault
    named: Finding | None
    others: tuple[Finding, ...]

    @property
    def killed(self) -> bool:
        """Whether its check rejected it, where it must show."""
        return self.named is not None


def judge_faults(
    faults: Sequence[Fault], seed: int, on_judged: Callable[[Judged], None] = lambda judged: None
) -> list[Judged]:
    """Each mistake by the case and in the world that must show it; the ranks live on from one to the next."""
    cases, judged = {case.name: case for case in CASES}, dict[str, Judged]()
    for size in sorted({fault.ranks for fault in faults}):
        with World(size, limits=WAIT) as world:
            for fault in (fault for fault in faults if fault.ranks == size):
                findings = judge(world, fault.make, describe(world, fault.make), cases[fault.case], seed)
                failed = [finding for finding in findings if not finding.ok]
                named = next((finding for finding in failed if finding.check == fault.check), None)
                others = tuple(finding for finding in failed if finding.check != fault.check)
                judged[fault.name] = each = Judged(fault, named, others)
                on_judged(each)
    return [judged[fault.name] for fault in faults]


def judge_honest(
    steps: Sequence[type[Runtime]],
    seeds: Sequence[int],
    worlds: Sequence[int],
    on_judged: Callable[[str], None] = lambda name: None,
) -> tuple[list[tuple[type[Runtime], Finding]], int]:
    """Each step by every case in every world: what was rejected, and how much was judged."""
    rejected, count = list[tuple[type[Runtime], Finding]](), 0
    for size in worlds:
        with World(size) as world:
            for make in steps:
                declared = describe(world, make)
                findings = [f for seed in seeds for case in CASES for f in judge(world, make, declared, case, seed)]
                rejected += [(make, finding) for finding in findings if not finding.ok]
                count += len(findings)
                on_judged(f"{make.__name__}, {size} ranks")
    return rejected, count


def payload(judged: Sequence[Judged], seed: int) -> dict[str, Any]:
    """What to keep of a run, as plain data; a mistake a row."""
    return {
        "passed": all(each.killed for each in judged),
        "seed": seed,
        "killed": sum(each.killed for each in judged),
        "survived": sum(not each.killed for each in judged),
        "faults": [
            {
                "name": each.fault.name,
                "mistake": each.fault.mistake,
                "case": f"{each.fault.case}, {each.fault.ranks} ranks",
                "check": each.fault.check,
                "finding": "" if each.named is None else str(each.named),
                "also": sorted({finding.check for finding in each.others}),
            }
            for each in judged
        ],
    }
