"""What a whole mutation run found, kept beside the sources: `mutants.json` for programs, `mutants.md` for people.

There is one of what the interpreter shows, and one for each GPU of what only it shows.

A record is of one state of the kernels. Judging them anew takes half an hour on two cores, too long for every change,
and each run of the tests judges a sample of the present sources anyway. So a stale record is no failure: `stale` says
what has changed since, and the suite shows that as an expected failure with the command that refreshes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mxref.verification.records.record import EVIDENCE
from mxref.verification.records.sources import digests
from mxref.verification.studies.mutation.mutant import Mutant, Source
from mxref.verification.studies.mutation.session import Fate, Judged, Session
from mxref.verification.studies.mutation.tables import kill_table

__all__ = ["COMMANDS", "RECORD", "judged_before", "stale", "unexplained", "write"]

RECORD = EVIDENCE / "interpreter-cpu" / "mutants.json"
COMMANDS = {
    "cpu": "mxref mutants --all --compile --device cpu --record",
    "cuda": "mxref mutants --all --gpu-only --compile --device cuda --record",
}
"""Device -> what writes its record."""

_SCHEMA = "mxref.mutants/3"
_WHERE = {
    "cpu": "In Triton's interpreter; what only a GPU shows, `mxref mutants --gpu-only` judges.",
    "cuda": "On a GPU: what the interpreter cannot show.",
}


def write(session: Session, sources: Mapping[str, Source], path: Path = RECORD) -> None:
    """Keep a run over the whole catalogue: the JSON at `path`, the tables beside it.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    fates = {fate: [judged for judged in session.judged if judged.fate is fate] for fate in Fate}
    entry = {
        "schema": _SCHEMA,
        "command": COMMANDS[session.device] + (" --matrix" if session.matrix else ""),
        "sources": _digests([*(judged.mutant for judged in session.judged), *session.unjudged], sources),
        "matrix": session.matrix,
        "layers": session.layers,
        "counts": {fate.value: len(fates[fate]) for fate in Fate},
        "killed": {judged.mutant.name: list(judged.kills) for judged in fates[Fate.KILLED]},
        "equivalent": {judged.mutant.name: judged.reason for judged in fates[Fate.EQUIVALENT]},
        "survived": [judged.mutant.name for judged in fates[Fate.SURVIVED]],
        "unjudged": [mutant.name for mutant in session.unjudged],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entry, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text("\n".join(_markdown(session, sources, entry)) + "\n", encoding="utf-8")


def stale(entry: Mapping[str, Any], mutants: Iterable[Mutant], sources: Mapping[str, Source]) -> str:
    """Which of the mutated files have changed since a record was written, and what refreshes it; "" for none."""
    then, now = entry["sources"], _digests(mutants, sources)
    changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    return f"older than {', '.join(changed)}; refresh it: {entry['command']}" if changed else ""


def unexplained(entry: Mapping[str, Any], mutants: Sequence[Mutant], sources: Mapping[str, Source]) -> list[Mutant]:
    """What a record of these very sources leaves open: survivors, and mutants for which there was no time.

    Raises:
        ValueError: the record is of other sources, or of another catalogue.
    """
    told = stale(entry, mutants, sources)
    if told:
        raise ValueError(f"the record is {told}")
    listed = {*entry["killed"], *entry["equivalent"], *entry["survived"], *entry["unjudged"]}
    if listed != {mutant.name for mutant in mutants}:
        raise ValueError(f"the record is of another catalogue; refresh it: {entry['command']}")
    return [mutant for mutant in mutants if mutant.name in {*entry["survived"], *entry["unjudged"]}]


def judged_before(entry: Mapping[str, Any], mutants: Iterable[Mutant]) -> list[Judged]:
    """What a record says of all that it does not leave open. A kill stays one as long as no guard is lost."""
    before = []
    for mutant in mutants:
        if mutant.name in entry["killed"]:
            before.append(Judged(mutant, Fate.KILLED, dict.fromkeys(entry["killed"][mutant.name], "recorded"), 0.0))
        elif mutant.name in entry["equivalent"]:
            before.append(Judged(mutant, Fate.EQUIVALENT, {}, 0.0, entry["equivalent"][mutant.name]))
    return before


def _digests(mutants: Iterable[Mutant], sources: Mapping[str, Source]) -> dict[str, str]:
    """Of the syntax trees of all files that hold mutants."""
    return digests({f"kernels/{file}": sources[file].text for file in sorted({mutant.file for mutant in mutants})})


def _markdown(session: Session, sources: Mapping[str, Source], entry: Mapping[str, Any]) -> Iterator[str]:
    counts, total = session.counts(), len(session.judged)
    yield "# Planted bugs and what noticed them"
    yield ""
    yield f"Written by `{entry['command']}`; not to be edited. Sources, by the SHA-256 of their syntax trees:"
    yield ", ".join(f"{name} {digest[:12]}" for name, digest in entry["sources"].items()) + "."
    yield ""
    yield (
        f"**{counts[Fate.KILLED]} of {total} mutants killed, {counts[Fate.EQUIVALENT]} equivalent "
        f"({counts[Fate.EQUIVALENT] / total:.1%}), {counts[Fate.SURVIVED]} survived, {len(session.unjudged)} not "
        f"judged.** {_WHERE[session.device]}"
    )
    yield ""
    if session.matrix:
        yield "Each column counts the mutants that a layer kills; the last row those that no other layer does."
    else:
        yield "Each column counts the mutants that a layer was the first to kill, in the order in which layers run."
    yield ""
    header, rows = kill_table(session)
    yield "| " + " | ".join(header) + " |"
    yield "|---" + "|---:" * (len(header) - 1) + "|"
    yield from ("| " + " | ".join(row) + " |" for row in rows)
    for fate, title in ((Fate.SURVIVED, "Survivors"), (Fate.EQUIVALENT, "Equivalent mutants")):
        judged = [each for each in session.judged if each.fate is fate]
        yield from ("", f"## {title}", "", *([] if judged else ["None."]))
        yield from (line for reason, group in _by_reason(judged) for line in _group(reason, group, sources))


def _by_reason(judged: Iterable[Judged]) -> Iterator[tuple[str, list[Judged]]]:
    groups: dict[str, list[Judged]] = {}
    for each in judged:
        groups.setdefault(each.reason, []).append(each)
    yield from groups.items()


def _group(reason: str, group: Iterable[Judged], sources: Mapping[str, Source]) -> Iterator[str]:
    if reason:
        yield from (reason, "")
    yield "```diff"
    for judged in group:
        before, after = judged.mutant.edit(sources[judged.mutant.file].text)
        yield from (f"# kernels/{judged.mutant.file}, {judged.mutant.function}", f"-{before}", f"+{after}")
    yield from ("```", "")
