"""What a mutation run found, for people: tables of checks and kinds of mistakes, and what was not killed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mxref.verification.checks.registry import why
from mxref.verification.report.output import new_table
from mxref.verification.report.own.markdown import markdown_table
from mxref.verification.studies.mutation.mutant import Mutant
from mxref.verification.studies.mutation.session import Fate, Judged, Session
from mxref.verification.studies.mutation.sources import Source

Rows = list[list[str]]
"""A table: its header, then its rows."""

_FOREIGN = "as a foreign kernel would be"
_WHERE = {
    "cpu": "In Triton's interpreter; what only a GPU shows, `mxref mutants --gpu-only` judges.",
    "cuda": "On a GPU: what the interpreter cannot show.",
}


def kills_by_check(session: Session) -> Rows:
    """How many mutants by hand each check kills, how many no other check does, and whom of the sweep it is first to."""
    by_hand = [judged.kills for judged in session.judged if judged.mutant.by_hand]
    swept = [next(iter(judged.kills), "") for judged in session.judged if not judged.mutant.by_hand]
    rows = [["check", "by hand", "alone", "first in the sweep"]]
    for check in ("import", *session.checks, "compile"):
        alone = str(sum(set(kills) == {check} for kills in by_hand)) if session.matrix else "–"
        rows.append([check, str(sum(check in kills for kills in by_hand)), alone, str(swept.count(check))])
    return rows


def kills_by_kind(session: Session) -> Rows:
    """By kind of mistake: mutants, how many are killed, and how many by what a kernel from elsewhere is asked too."""
    kinds: dict[str, list[Judged]] = {}
    for judged in sorted(session.judged, key=lambda judged: (not judged.mutant.by_hand, judged.mutant.category)):
        kinds.setdefault(("" if judged.mutant.by_hand else "sweep: ") + judged.mutant.category, []).append(judged)
    rows = [["kind", "mutants", "killed", _FOREIGN]]
    for kind, members in [*kinds.items(), ("all", session.judged)]:
        killed = [judged for judged in members if judged.fate is Fate.KILLED]
        foreign = sum(judged.by_foreign for judged in killed)
        share = [f"{len(killed)}", f"{foreign} ({foreign / len(members):.0%})"] if members else ["0", "0"]
        rows.append([kind, str(len(members)), *share])
    return rows


def idle(session: Session) -> dict[str, str]:
    """Check -> why it stays, for each that kills no mutant by hand alone: known where every check asked about each."""
    alone = {next(iter(judged.kills)) for judged in session.judged if judged.mutant.by_hand and len(judged.kills) == 1}
    return {check: why()[check] for check in session.checks if check not in alone} if session.matrix else {}


def print_session(session: Session, sources: Mapping[str, Source], console: Console) -> None:
    """Kills by check and kind of mistake, survivors with their edits, and the verdict last."""
    for rows in (kills_by_check(session), kills_by_kind(session)):
        console.print(_table(rows))
    alive = [judged for judged in session.judged if judged.fate is not Fate.KILLED]
    for judged in sorted(alive, key=lambda judged: judged.fate is Fate.SURVIVED):
        _print_alive(judged, sources, console)
    colour = "red" if session.exit_code else "green"
    console.print(f"[bold {colour}]{_verdict(session)}[/]; {session.seconds:.0f} s", highlight=False)


def print_list(mutants: Sequence[Mutant], console: Console) -> None:
    """The catalogue, one line a mutant."""
    table = Table("mutant", "kind", "where", "", box=None, header_style="bright_black")
    for mutant in mutants:
        place = f"{mutant.place.file}:{mutant.line} {mutant.place.function}"
        table.add_row(escape(mutant.name), mutant.category, place, "GPU only" if mutant.gpu_only else "")
    console.print(table)


def as_markdown(session: Session, sources: Mapping[str, Source], entry: Mapping[str, Any]) -> str:
    """The page beside a record."""
    return "\n".join(_page(session, sources, entry)) + "\n"


def _page(session: Session, sources: Mapping[str, Source], entry: Mapping[str, Any]) -> Iterator[str]:
    yield from ("# Planted bugs and what noticed them", "")
    yield f"Written by `{entry['command']}`, {entry['recorded'][:10]}, {entry['device']}; not to be edited."
    yield from ("", f"**{_verdict(session)}.** {_WHERE[session.device]}", "")
    yield (
        "Every check is asked about every mutant by hand; «alone» counts those that no other check rejects. Mutants of "
        "the sweep are asked in the gate's order, until a check has rejected them that a kernel from elsewhere is asked "
        f"too: «{_FOREIGN}» counts what such checks kill."
        if session.matrix
        else "Mutants are asked in the gate's order, until a check has rejected them that a kernel from elsewhere is "
        f"asked too: «{_FOREIGN}» counts what such checks kill."
    )
    for header, *rows in (kills_by_check(session), kills_by_kind(session)):
        yield from ("", *markdown_table(header, rows))
    if session.matrix:
        yield from ("", "## Checks that no mutant by hand needs, and why they stay", "")
        yield from (f"- **{check}**: {reason}" for check, reason in idle(session).items())
    for fate in (Fate.SURVIVED, Fate.UNJUDGED, Fate.EQUIVALENT):
        members = [judged for judged in session.judged if judged.fate is fate]
        yield from ("", f"## {str(fate).capitalize()}", "", *([] if members else ["None."]))
        for reason, group in _by_reason(members).items():
            yield from _group(reason, group, sources)


def _verdict(session: Session) -> str:
    counts, total = session.counts(), len(session.judged)
    unjudged = f", {counts[Fate.UNJUDGED]} not judged" if counts[Fate.UNJUDGED] else ""
    foreign = sum(judged.by_foreign for judged in session.judged)
    return (
        f"{counts[Fate.KILLED]} of {total} mutants killed, {foreign} {_FOREIGN}; {counts[Fate.EQUIVALENT]} equivalent, "
        f"{counts[Fate.SURVIVED]} survived without an explanation{unjudged}"
    )


def _table(rows: Rows) -> Table:
    table = new_table(rows[0][0], *(f">{column}" for column in rows[0][1:]))
    for row in rows[1:]:
        table.add_row(*(cell if cell != "0" else "·" for cell in row), style="bold" if row[0] == "all" else None)
    return table


def _print_alive(judged: Judged, sources: Mapping[str, Source], console: Console) -> None:
    mutant = judged.mutant
    before, after = mutant.edit(sources[mutant.place.file].text)
    colour = "bright_black" if judged.fate is Fate.EQUIVALENT else "red"
    place = f"kernels/{mutant.place.file}:{mutant.line}"
    console.print(f"[{colour}]{judged.fate}[/] {escape(mutant.name)}  {place}", highlight=False)
    console.print(f"  [red]-[/] {escape(before)}\n  [green]+[/] {escape(after)}", highlight=False)
    if judged.reason or mutant.why:
        console.print(f"  {escape(judged.reason or mutant.why)}", style="bright_black", highlight=False)


def _by_reason(judged: Iterable[Judged]) -> dict[str, list[Judged]]:
    groups: dict[str, list[Judged]] = {}
    for each in judged:
        groups.setdefault(each.reason, []).append(each)
    return groups


def _group(reason: str, group: Iterable[Judged], sources: Mapping[str, Source]) -> Iterator[str]:
    if reason:
        yield from (reason, "")
    yield "```diff"
    for judged in group:
        before, after = judged.mutant.edit(sources[judged.mutant.place.file].text)
        yield from (f"# {judged.mutant.place}", f"-{before}", f"+{after}")
    yield from ("```", "")
