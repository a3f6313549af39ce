"""`mxref evidence`: which records are kept, and whether they are of the sources and versions that are here.

List the records of what GPUs and the interpreter saw: whether each is of the sources that are here, which versions
differ, and which command writes it again.

A kernel's gate record must be fresh; any other record may be stale, and is shown with its date.

exit codes: 0 the gate's records are fresh and nothing is damaged, 1 not so, 2 wrong use
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from mxref.verification.cli import UsageError
from mxref.verification.cli.options import terminal
from mxref.verification.clone import EVIDENCE
from mxref.verification.records.freshness import State, problems, survey
from mxref.verification.records.readme import update_readme

_COLUMNS = ("where", "record", "date", "result", "sources", "versions here")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--evidence", metavar="DIR", type=Path, default=EVIDENCE, help="one folder a device")
    parser.add_argument("--readme", action="store_true", help="only write the README's generated parts")


def run(arguments: argparse.Namespace) -> int:
    """The subcommand; its exit code.

    Raises:
        UsageError: there is no such folder, or no README to write to.
    """
    if not arguments.evidence.is_dir():
        raise UsageError(f"--evidence {arguments.evidence} is no folder")
    if arguments.readme:
        try:
            print(f"written: {update_readme(root=arguments.evidence)}")
        except (OSError, ValueError) as error:
            raise UsageError(str(error)) from None
        return 0
    console = terminal(160)
    states = survey(arguments.evidence)
    console.print(_table(states), highlight=False)
    for command in dict.fromkeys(state.entry["command"] for state in states if state.entry and not state.fresh):
        console.print(f"again: {command}", style="bright_black", highlight=False)
    wrong = problems(arguments.evidence)
    for problem in wrong:
        console.print(problem, style="red", highlight=False, markup=False, soft_wrap=True)
    return int(bool(wrong))


def _table(states: list[State]) -> Table:
    table = Table(*_COLUMNS, box=None, header_style="bright_black")
    for state in states:
        if state.damage:
            table.add_row(state.folder, state.kind, "", "", "damaged", "", style="red")
            continue
        result = "failed" if state.failed else "passed" if state.entry.get("passed") else "–"
        sources = "fresh" if state.fresh else f"stale: {len(state.changed)} changed" if state.changed else "unknown"
        moved = "; ".join(state.moved) or ("the same" if state.entry["versions"] else "unknown")
        style = "red" if state.failed or (state.kind == "gate" and not state.fresh) else None
        table.add_row(state.folder, state.kind, state.entry["recorded"][:10], result, sources, moved, style=style)
    return table
