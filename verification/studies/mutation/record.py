"""A run over the whole catalogue as plain data for a record, and what a record leaves open."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mxref.verification.studies.mutation.mutant import Mutant
from mxref.verification.studies.mutation.session import Fate, Judged, Session
from mxref.verification.studies.mutation.sources import Source


def payload(session: Session) -> dict[str, Any]:
    """What to keep of a run: the mutants by their fate, killed ones with the checks that rejected them.

    Those that are not named are left open.
    """
    fates = {fate: [judged for judged in session.judged if judged.fate is fate] for fate in Fate}
    return {
        "passed": session.passed,
        "matrix": session.matrix,
        "checks": session.checks,
        "counts": {fate.value: len(fates[fate]) for fate in Fate},
        "killed as a foreign kernel would be": sum(judged.by_foreign for judged in session.judged),
        "killed": {judged.mutant.name: list(judged.kills) for judged in fates[Fate.KILLED]},
        "equivalent": {judged.mutant.name: judged.reason for judged in fates[Fate.EQUIVALENT]},
        "survived": [judged.mutant.name for judged in fates[Fate.SURVIVED]],
    }


def texts(mutants: Iterable[Mutant], sources: Mapping[str, Source]) -> dict[str, str]:
    """The sources that a record is of, all files that hold mutants, named as in every record."""
    return {f"kernels/{file}": sources[file].text for file in sorted({mutant.place.file for mutant in mutants})}


def left_open(entry: Mapping[str, Any], mutants: Sequence[Mutant]) -> list[Mutant]:
    """The mutants that a record of this very catalogue does not explain: survivors, and what nobody judged.

    Raises:
        ValueError: it is of another catalogue.
    """
    explained = {*entry["killed"], *entry["equivalent"]}
    if not explained <= {mutant.name for mutant in mutants}:  # a survivor may since be a GPU's to judge
        raise ValueError(f"the record is of another catalogue; write it again: {entry['command']}")
    return [mutant for mutant in mutants if mutant.name not in explained]


def judged_before(entry: Mapping[str, Any], mutants: Iterable[Mutant]) -> list[Judged]:
    """What a record says of all that it does not leave open. A kill stays one as long as no check is lost."""
    before = []
    for mutant in mutants:
        if mutant.name in entry["killed"]:
            before.append(Judged(mutant, Fate.KILLED, dict.fromkeys(entry["killed"][mutant.name], "recorded")))
        elif mutant.name in entry["equivalent"]:
            before.append(Judged(mutant, Fate.EQUIVALENT, reason=entry["equivalent"][mutant.name]))
    return before
