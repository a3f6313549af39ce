"""One run over some mutants: the sources as they are first, then the mutants, then a close look at the survivors."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from hashlib import sha256
from typing import Any

import torch

from mxref.verification.candidates.candidate import Candidate
from mxref.verification.cases.case import Sample
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.studies.mutation.catalogue import arguments
from mxref.verification.studies.mutation.compiled import same_code
from mxref.verification.studies.mutation.layers import Layer, Trial, questions
from mxref.verification.studies.mutation.mutant import Mutant
from mxref.verification.studies.mutation.runner import Outcome, Setting, run
from mxref.verification.studies.mutation.sources import Source, fingerprint

__all__ = ["EQUIVALENT_SHARE", "TRIAL_SECONDS", "FalseKillError", "Fate", "Judged", "Session", "judge"]

EQUIVALENT_SHARE = 0.05
"""At most this part of the mutants may be equivalent: more, and the operators plant bugs that are none."""

TRIAL_SECONDS = {"cpu": 15.0, "cuda": 25.0}
"""A mutant's trial that takes more processor time than this hangs."""


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
    """A mutant, its fate, and why: the first layer's reason, the argument for its equivalence, or why nobody knows."""

    mutant: Mutant
    fate: Fate
    kills: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""


@dataclass
class Session:
    """Everything that one run found out.

    Attributes:
        device: where mutants were judged.
        sources: fingerprint of the kernels' sources.
        matrix: whether every layer judged every mutant; otherwise the first that rejects one ends its trial.
        layers: names, in the order in which they judge.
        judged: one a mutant.
        baseline_seconds, seconds: the unmutated sources' time, and the whole run's.
    """

    device: str
    sources: str
    matrix: bool
    layers: list[str]
    judged: list[Judged] = field(default_factory=list)
    baseline_seconds: float = 0.0
    seconds: float = 0.0

    def counts(self) -> Counter[Fate]:
        """Mutants by fate."""
        return Counter(judged.fate for judged in self.judged)

    def only(self, layer: str) -> list[Judged]:
        """Mutants that `layer` alone rejects; tells something with `matrix` only."""
        return [judged for judged in self.judged if set(judged.kills) == {layer}]

    @property
    def exit_code(self) -> int:
        """0 if all are judged, every survivor is explained, and few need to be; 1 otherwise."""
        counts = self.counts()
        many = counts[Fate.EQUIVALENT] > max(1, EQUIVALENT_SHARE * len(self.judged))
        return int(bool(counts[Fate.SURVIVED] or counts[Fate.UNJUDGED]) or many)

    def as_json(self, sources: Mapping[str, Source]) -> dict[str, Any]:
        """Plain data, complete."""
        return {
            "schema": "mxref.mutants/1",
            "device": self.device,
            "sources": self.sources,
            "matrix": self.matrix,
            "layers": self.layers,
            "counts": {fate.value: self.counts()[fate] for fate in Fate},
            "killed only by": {layer: len(self.only(layer)) for layer in self.layers} if self.matrix else None,
            "seconds": round(self.seconds, 1),
            "mutants": [_as_json(judged, sources) for judged in self.judged],
        }


def judge(
    mutants: Sequence[Mutant],
    layers: Sequence[Layer],
    fixtures: Sequence[Sample],
    setting: Setting,
    *,
    seconds: float = math.inf,
    compile_survivors: bool = False,
    on_start: Callable[[str], None] = lambda what: None,
    on_judged: Callable[[Outcome], None] = lambda outcome: None,
) -> Session:
    """Judge mutants.

    Args:
        mutants: of the catalogue.
        layers: what judges, from `layers`.
        fixtures: on which an equivalent mutant must give the same bits.
        setting: how.
        seconds: after so many no further mutant is begun.
        compile_survivors: also ask the compiler whether a survivor's code is the unmutated one's.
        on_start: told what begins.
        on_judged: called as each mutant is done.

    Raises:
        FalseKillError: a layer rejects the unmutated sources, or gives no answer about them.
    """
    start = time.monotonic()
    names = [layer.name for layer in layers]
    session = Session(setting.device.type, fingerprint(setting.sources), setting.matrix, names)
    on_start("mutants, and the sources as they are")

    def judged(outcome: Outcome) -> None:
        if outcome.mutant is not None:
            on_judged(outcome)
            return
        for layer, reason in outcome.kills.items():
            raise FalseKillError(f"layer {layer!r} rejects the unmutated sources, so no kill would count: {reason}")
        for layer, reason in outcome.unjudged.items():
            raise FalseKillError(f"layer {layer!r} gives no answer about the unmutated sources: {reason}")

    asked = questions(layers)
    outcomes = run([None, *mutants], asked, setting, apart=True, until=start + seconds, on_outcome=judged)
    session.baseline_seconds = sum(outcome.seconds for outcome in outcomes if outcome.mutant is None)
    begun = {outcome.mutant.name: outcome for outcome in outcomes if outcome.mutant is not None}
    alive = [mutant for mutant in mutants if mutant.name in begun and not begun[mutant.name].killed]
    reasons, broken = _explain(alive, fixtures, setting, compile_survivors, on_start)
    for mutant in mutants:
        outcome = begun.get(mutant.name, Outcome(mutant, unjudged={"": "there was no time for it"}))
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


def _explain(
    survivors: Sequence[Mutant],
    fixtures: Sequence[Sample],
    setting: Setting,
    compile_survivors: bool,
    on_start: Callable[[str], None],
) -> tuple[dict[str, str], set[str]]:
    """Name -> why the survivor is equivalent, for those that are; and the names of those that do not compile."""
    declared = arguments(survivors, setting.sources)
    reasons, broken = dict[str, str](), set[str]()
    if declared:
        on_start("bits of the equivalent mutants")
        whom = [None, *(mutant for mutant in survivors if mutant.name in declared)]
        patient = replace(setting, trial_seconds=60 + 20 * setting.trial_seconds)
        told = run(whom, questions([_bits(fixtures, setting.device)]), patient)
        expected = told[0].kills.get("bits")
        if expected is None:
            raise FalseKillError(f"the unmutated sources give no results: {told[0].unjudged}")
        same = {outcome.mutant.name for outcome in told if outcome.mutant and outcome.kills.get("bits") == expected}
        reasons = {name: argument for name, argument in declared.items() if name in same}
    rest = [mutant for mutant in survivors if mutant.name not in reasons]
    if compile_survivors and rest:
        on_start("compiled code of the survivors")
        unchanged, broken = same_code(rest, setting.sources, setting.jobs)
        reasons |= dict.fromkeys(unchanged, "compiles to the unmutated sources' code")
    return reasons, broken


def _bits(fixtures: Sequence[Sample], device: torch.device) -> Layer:
    """A layer that accepts nothing: what it says is a digest of all results, to be compared."""

    def digest(candidate: Candidate) -> list[Finding]:
        told = sha256()
        for sample in fixtures:
            for name, tensor in candidate.run(sample.to(device)).items():
                told.update(name.encode())
                if tensor is not None:
                    told.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return [Finding("bits", told.hexdigest(), "all", Status.FAIL, "a digest", 0, 0)]

    return Layer("bits", (Trial("fixtures", digest),))


def _as_json(judged: Judged, sources: Mapping[str, Source]) -> dict[str, Any]:
    mutant = judged.mutant
    before, after = mutant.edit(sources[mutant.place.file].text)
    return {
        "name": mutant.name,
        "file": mutant.place.file,
        "function": mutant.place.function,
        "line": mutant.line,
        "category": mutant.category,
        "by hand": mutant.by_hand,
        "before": before,
        "after": after,
        "fate": judged.fate.value,
        "kills": dict(judged.kills),
        "reason": judged.reason,
        "seconds": round(judged.seconds, 2),
    }
