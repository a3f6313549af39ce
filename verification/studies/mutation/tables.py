"""A mutation run as text in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mxref.verification.studies.mutation.mutant import Mutant
from mxref.verification.studies.mutation.session import Fate, Judged, Session
from mxref.verification.studies.mutation.sources import Source

__all__ = ["kill_table", "print_list", "print_session"]


def print_session(session: Session, sources: Mapping[str, Source], console: Console) -> None:
    """Kills by layer and kind of mistake, survivors with their edits, and the verdict last."""
    console.print(_kills(session))
    survivors = [judged for judged in session.judged if judged.fate is not Fate.KILLED]
    for judged in sorted(survivors, key=lambda judged: judged.fate is Fate.SURVIVED):
        _print_survivor(judged, sources, console)
    counts, total = session.counts(), len(session.judged)
    colour = "red" if session.exit_code else "green"
    console.print(
        f"[bold {colour}]{counts[Fate.KILLED]} of {total} mutants killed[/], {counts[Fate.EQUIVALENT]} equivalent, "
        f"{counts[Fate.SURVIVED]} survived without an explanation"
        f"{f', {counts[Fate.UNJUDGED]} not judged' if counts[Fate.UNJUDGED] else ''}; {session.seconds:.0f} s",
        highlight=False,
    )


def print_list(mutants: Sequence[Mutant], console: Console) -> None:
    """The catalogue, one line a mutant."""
    table = Table("mutant", "kind", "where", "", box=None, header_style="bright_black")
    for mutant in mutants:
        place = f"{mutant.place.file}:{mutant.line} {mutant.place.function}"
        table.add_row(escape(mutant.name), mutant.category, place, "GPU only" if mutant.gpu_only else "")
    console.print(table)


def kill_table(session: Session) -> tuple[list[str], list[list[str]]]:
    """Kills by kind of mistake and layer: the header, a row a kind, then all together and what only a layer kills."""
    layers = [
        name
        for name in ("import", *session.layers, "compile")
        if any(name in judged.kills for judged in session.judged)
    ]
    rows = []
    for by_hand in (True, False):
        for kind in sorted({judged.mutant.category for judged in session.judged if judged.mutant.by_hand is by_hand}):
            members = [j for j in session.judged if j.mutant.by_hand is by_hand and j.mutant.category == kind]
            rows.append(_row(kind if by_hand else f"sweep: {kind}", members, layers))
    rows.append(_row("all", session.judged, layers))
    if session.matrix:
        rows.append(["by no other layer", "", *(str(len(session.only(layer))) for layer in layers), ""])
    return ["kind", "mutants", *layers, "killed"], rows


def _kills(session: Session) -> Table:
    header, rows = kill_table(session)
    title = "mutants that each layer kills" if session.matrix else "the layer that kills a mutant first"
    table = Table(title=title, box=SIMPLE_HEAD, header_style="bright_black", title_style="", pad_edge=False)
    for column in header:
        table.add_column(column, justify="left" if column == "kind" else "right")
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == "all" else None)
    return table


def _row(kind: str, members: Sequence[Judged], layers: Sequence[str]) -> list[str]:
    killed = sum(judged.fate is Fate.KILLED for judged in members)
    share = f"{killed / len(members):.0%}" if members else "–"
    kills = [sum(layer in judged.kills for judged in members) for layer in layers]
    return [kind, str(len(members)), *(str(count or "·") for count in kills), share]


def _print_survivor(judged: Judged, sources: Mapping[str, Source], console: Console) -> None:
    mutant = judged.mutant
    before, after = mutant.edit(sources[mutant.place.file].text)
    colour = "bright_black" if judged.fate is Fate.EQUIVALENT else "red"
    place = f"kernels/{mutant.place.file}:{mutant.line}"
    console.print(f"[{colour}]{judged.fate}[/] {escape(mutant.name)}  {place}", highlight=False)
    console.print(f"  [red]-[/] {escape(before)}\n  [green]+[/] {escape(after)}", highlight=False)
    if judged.reason or mutant.why:
        console.print(f"  {escape(judged.reason or mutant.why)}", style="bright_black", highlight=False)
