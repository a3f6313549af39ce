"""One run over some mutants: the sources as they are first, then the mutants, then a close look at the survivors."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from mxref.verification.checks.registry import STATE
from mxref.verification.gate.plan import Item
from mxref.verification.studies.mutation.catalogue import arguments
from mxref.verification.studies.mutation.compiled import same_code
from mxref.verification.studies.mutation.mutant import Mutant
from mxref.verification.studies.mutation.questions import BITS, FOREIGN, bits
from mxref.verification.studies.mutation.runner import Outcome, Setting, run

EQUIVALENT_SHARE = 0.05
"""At most this part of the mutants may be equivalent: more, and the operators plant bugs that are none."""

TRIAL_SECONDS = {"cpu": 5.0, "cuda": 25.0}
"""A question about a mutant that takes more processor time than this hangs, unless the unmutated sources take long."""


class FalseKillError(RuntimeError):
    """The unmutated sources are rejected, so that no kill would mean anything."""


class Fate(StrEnum):
    """What became of a mutant."""

    KILLED = "killed"
    EQUIVALENT = "equivalent"
    SURVIVED = "survived"
    UNJUDGED = "not judged"


@dataclass(frozen=True)
class Judged:
    """A mutant, its fate, and why: a check's reason, the argument for its equivalence, or why nobody knows.

    `kills`: check -> its reason, for each that rejected it; "compile" for the compiler.
    """

    mutant: Mutant
    fate: Fate
    kills: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""

    @property
    def by_foreign(self) -> bool:
        """Whether it is killed by what a kernel from elsewhere is asked too."""
        return not FOREIGN.isdisjoint(self.kills)


@dataclass
class Session:
    """Everything that one run found out.

    Attributes:
        device: where mutants were judged.
        matrix: whether every check was asked about every mutant by hand.
        checks: names, in the order in which they are asked.
        judged: one a mutant.
        seconds: the whole run's.
    """

    device: str
    matrix: bool
    checks: list[str]
    judged: list[Judged] = field(default_factory=list)
    seconds: float = 0.0

    def counts(self) -> Counter[Fate]:
        """Mutants by fate."""
        return Counter(judged.fate for judged in self.judged)

    @property
    def passed(self) -> bool | None:
        """Whether every survivor is explained, and few need to be; None where that is so, but not all are judged."""
        counts = self.counts()
        if counts[Fate.SURVIVED] or counts[Fate.EQUIVALENT] > max(1, EQUIVALENT_SHARE * len(self.judged)):
            return False
        return None if counts[Fate.UNJUDGED] else True

    @property
    def exit_code(self) -> int:
        """0 if they have passed, 1 otherwise."""
        return int(not self.passed)


def judge(
    mutants: Sequence[Mutant],
    items: Sequence[Item],
    setting: Setting,
    *,
    seconds: float = math.inf,
    compile_survivors: bool = False,
    alive_before: Collection[str] = (),
    on_start: Callable[[str], None] = lambda what: None,
    on_judged: Callable[[Outcome], None] = lambda outcome: None,
) -> Session:
    """Judge mutants.

    Args:
        mutants: of the catalogue.
        items: the questions, in this order.
        setting: how.
        seconds: after so many no further mutant is begun.
        compile_survivors: also ask the compiler whether a survivor's code is the unmutated one's.
        alive_before: mutants that survived an earlier run. The compiler is asked about them first: nothing else is asked
            about those whose code is the unmutated one's.
        on_start: told what begins.
        on_judged: called as each mutant is done.

    Interrupted, it ends with what is known by then, once the sources as they are have passed.

    Raises:
        FalseKillError: a check rejects the unmutated sources, or gives no answer about them.
    """
    start = time.monotonic()
    checks = dict.fromkeys(check.name for item in items for check in item.checks)
    session = Session(setting.device.type, setting.matrix, [*checks, STATE.name])
    begun = dict[str, Outcome]()
    on_start("the sources as they are")

    def judged(outcome: Outcome) -> None:
        if outcome.mutant is not None:
            begun[outcome.mutant.name] = outcome
            on_judged(outcome)
            return
        for check, reason in outcome.kills.items():
            raise FalseKillError(f"check {check!r} rejects the unmutated sources, so no kill would count: {reason}")
        for check, reason in outcome.unjudged.items():
            raise FalseKillError(f"check {check!r} gives no answer about the unmutated sources: {reason}")

    swept = any(not mutant.by_hand for mutant in mutants)
    healthy = run([None], items, replace(setting, traced=swept), apart=True, on_outcome=judged)
    coverage = {item: functions for outcome in healthy for item, functions in outcome.coverage.items()}
    usual = {item: seconds for outcome in healthy for item, seconds in outcome.usual.items()}
    setting = replace(setting, usual=usual)
    reasons, broken, missing = dict[str, str](), set[str](), "there was no time for it"

    def compile_these(survivors: list[Mutant]) -> None:
        if compile_survivors and survivors:
            on_start("compiled code of the survivors")
            unchanged, hazardous = same_code(survivors, setting.sources, setting.jobs)
            reasons.update(dict.fromkeys(unchanged, "compiles to the unmutated sources' code"))
            broken.update(hazardous)

    try:
        compile_these([mutant for mutant in mutants if mutant.name in alive_before])
        asked = [mutant for mutant in mutants if mutant.name not in reasons and mutant.name not in broken]
        on_start("mutants")
        run(asked, items, setting, coverage=coverage, until=start + seconds, on_outcome=judged)
        alive = [mutant for mutant in asked if mutant.name in begun and not begun[mutant.name].killed]
        reasons |= _declared_equivalent(alive, items, setting, on_start)
        compile_these([m for m in alive if m.name not in reasons and m.name not in alive_before])
    except KeyboardInterrupt:  # what is known is kept; who is alive may still be equivalent
        missing = "interrupted before it was judged to the end"
        begun = {name: outcome for name, outcome in begun.items() if outcome.killed or name in reasons}
    for mutant in mutants:
        outcome = begun.get(mutant.name, Outcome(mutant, unjudged={"": missing}))
        if mutant.name in broken:
            outcome.kills["compile"] = "does not compile for a GPU, or only with a hazard"
        session.judged.append(_judged(mutant, outcome, reasons.get(mutant.name, "")))
    session.seconds = time.monotonic() - start
    return session


def _judged(mutant: Mutant, outcome: Outcome, explanation: str) -> Judged:
    """What an outcome means."""
    if outcome.killed:
        fate, reason = Fate.KILLED, next(iter(outcome.kills.values()))
    elif explanation:
        fate, reason = Fate.EQUIVALENT, explanation
    elif outcome.unjudged:
        fate, reason = Fate.UNJUDGED, next(iter(outcome.unjudged.values()))
    else:
        fate, reason = Fate.SURVIVED, ""
    return Judged(mutant, fate, outcome.kills, outcome.seconds, reason)


def _bits_of(outcome: Outcome) -> str:
    """The digest of what a mutant computes, see `bits`; "" if it could not be made."""
    found = re.search(r"\b[0-9a-f]{64}\b", outcome.kills.get(BITS, ""))
    return found.group() if found else ""


def _declared_equivalent(
    survivors: Sequence[Mutant], items: Sequence[Item], setting: Setting, on_start: Callable[[str], None]
) -> dict[str, str]:
    """Name -> the argument, for the survivors that are argued to change nothing and have the sources' bits."""
    declared = arguments(survivors, setting.sources)
    if not declared:
        return {}
    on_start("bits of the equivalent mutants")
    whom = [None, *(mutant for mutant in survivors if mutant.name in declared)]
    told = run(whom, [bits(items)], replace(setting, trial_seconds=60 + sum(setting.usual.values())))
    expected = _bits_of(told[0])
    if not expected:
        raise FalseKillError(f"the unmutated sources give no results: {told[0].kills or told[0].unjudged}")
    same = {outcome.mutant.name for outcome in told if outcome.mutant and _bits_of(outcome) == expected}
    return {name: argument for name, argument in declared.items() if name in same}
