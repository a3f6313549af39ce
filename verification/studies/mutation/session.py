"""One run over some mutants: the sources as they are first, then the mutants, then a close look at the survivors."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from typing import Any

import torch

from mxref.verification.candidates.candidate import Candidate
from mxref.verification.cases.case import Sample
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.studies.mutation.compiled import same_code
from mxref.verification.studies.mutation.equivalents import argument_for
from mxref.verification.studies.mutation.layers import Layer, Trial
from mxref.verification.studies.mutation.mutant import Mutant, Source, fingerprint
from mxref.verification.studies.mutation.runner import Outcome, run

__all__ = ["EQUIVALENT_SHARE", "FalseKillError", "Fate", "Judged", "Session", "judge"]

EQUIVALENT_SHARE = 0.05
"""At most this part of the mutants may be equivalent: more, and the operators plant bugs that are none."""

_TRIAL_SECONDS = {"cpu": 15.0, "cuda": 25.0}
"""A mutant's trial that takes more processor time than this hangs."""


class FalseKillError(RuntimeError):
    """The unmutated sources are rejected, so that no kill would mean anything."""


class Fate(StrEnum):
    """What became of a mutant."""

    KILLED = "killed"
    EQUIVALENT = "equivalent"
    SURVIVED = "survived"


@dataclass(frozen=True)
class Judged:
    """A mutant, its fate, and why: the first layer's reason, or the argument for its equivalence."""

    mutant: Mutant
    fate: Fate
    kills: Mapping[str, str]
    seconds: float
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
        unjudged: mutants for which there was no time.
        baseline_seconds, seconds: the unmutated sources' time, and the whole run's.
    """

    device: str
    sources: str
    matrix: bool
    layers: list[str]
    judged: list[Judged] = field(default_factory=list)
    unjudged: list[Mutant] = field(default_factory=list)
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
        return int(bool(counts[Fate.SURVIVED] or self.unjudged) or many)

    def as_json(self, sources: Mapping[str, Source]) -> dict[str, Any]:
        """Plain data, complete."""
        return {
            "schema": "mxref.mutants/1",
            "device": self.device,
            "sources": self.sources,
            "matrix": self.matrix,
            "layers": self.layers,
            "counts": {fate.value: self.counts()[fate] for fate in Fate} | {"unjudged": len(self.unjudged)},
            "killed only by": {layer: len(self.only(layer)) for layer in self.layers} if self.matrix else None,
            "seconds": round(self.seconds, 1),
            "mutants": [_as_json(judged, sources) for judged in self.judged],
        }


def judge(
    mutants: Sequence[Mutant],
    sources: Mapping[str, Source],
    layers: Sequence[Layer],
    fixtures: Sequence[Sample],
    device: torch.device,
    *,
    matrix: bool = False,
    jobs: int = 1,
    seconds: float = math.inf,
    compile_survivors: bool = False,
    on_start: Callable[[str], None] = lambda what: None,
    on_judged: Callable[[Outcome], None] = lambda outcome: None,
) -> Session:
    """Judge mutants.

    Args:
        mutants: of the catalogue.
        sources: the kernels' sources.
        layers: what judges, from `layers`.
        fixtures: on which an equivalent mutant must give the same bits.
        device: where.
        matrix: see `Session`.
        jobs: processes at once.
        seconds: after so many no further mutant is begun.
        compile_survivors: also ask the compiler whether a survivor's code is the unmutated one's.
        on_start: told what begins.
        on_judged: called as each mutant is done.

    Raises:
        FalseKillError: a layer rejects the unmutated sources.
    """
    start = time.monotonic()
    session = Session(device.type, fingerprint(sources), matrix, [layer.name for layer in layers])
    on_start("mutants, and the sources as they are")

    def judged(outcome: Outcome) -> None:
        if outcome.mutant is not None:
            on_judged(outcome)
        for layer, reason in outcome.kills.items() if outcome.mutant is None else ():
            raise FalseKillError(f"layer {layer!r} rejects the unmutated sources, so no kill would count: {reason}")

    limit = _TRIAL_SECONDS[device.type]
    outcomes = run(
        [None, *mutants], sources, layers, device=device, matrix=matrix, apart=True, jobs=jobs, trial_seconds=limit,
        until=start + seconds, on_outcome=judged,
    )  # fmt: skip
    session.baseline_seconds = sum(outcome.seconds for outcome in outcomes if outcome.mutant is None)
    begun = [(outcome.mutant, outcome) for outcome in outcomes if outcome.mutant is not None]
    names = {mutant.name for mutant, _ in begun}
    session.unjudged = [mutant for mutant in mutants if mutant.name not in names]
    survivors = [mutant for mutant, outcome in begun if not outcome.killed]
    reasons, broken = _explain(survivors, sources, fixtures, device, jobs, limit, compile_survivors, on_start)
    for mutant, outcome in begun:
        if mutant.name in broken:
            outcome.kills["compile"] = "does not compile for a GPU, or only with a hazard"
        reason = next(iter(outcome.kills.values()), reasons.get(mutant.name, ""))
        fate = Fate.KILLED if outcome.killed else Fate.EQUIVALENT if reason else Fate.SURVIVED
        session.judged.append(Judged(mutant, fate, outcome.kills, outcome.seconds, reason))
    session.seconds = time.monotonic() - start
    return session


def _explain(
    survivors: Sequence[Mutant],
    sources: Mapping[str, Source],
    fixtures: Sequence[Sample],
    device: torch.device,
    jobs: int,
    limit: float,
    compile_survivors: bool,
    on_start: Callable[[str], None],
) -> tuple[dict[str, str], set[str]]:
    """Name -> why the survivor is equivalent, for those that are; and the names of those that do not compile."""
    declared = [mutant for mutant in survivors if argument_for(mutant, sources)]
    reasons, broken = dict[str, str](), set[str]()
    if declared:
        on_start("bits of the equivalent mutants")
        told = run(
            [None, *declared],
            sources,
            [_bits(fixtures, device)],
            device=device,
            jobs=jobs,
            trial_seconds=60 + 20 * limit,
        )
        expected = told[0].kills["bits"]
        for outcome in told[1:]:
            assert outcome.mutant is not None
            if outcome.kills.get("bits") == expected:
                reasons[outcome.mutant.name] = argument_for(outcome.mutant, sources) or ""
    rest = [mutant for mutant in survivors if mutant.name not in reasons]
    if compile_survivors and rest:
        on_start("compiled code of the survivors")
        same, broken = same_code(rest, sources, jobs)
        reasons |= dict.fromkeys(same, "compiles to the unmutated sources' code")
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
    before, after = mutant.edit(sources[mutant.file].text)
    return {
        "name": mutant.name,
        "file": mutant.file,
        "function": mutant.function,
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
