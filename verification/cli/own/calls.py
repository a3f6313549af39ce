"""`mxref calls`: judge a layer with planted bugs of how it is called; the checks must reject every one.

Plant bugs in an honest layer in plain PyTorch, each a mistake in how calls are taken (strides, which gradients are
needed, what is remembered, sizes, numbers), and judge each as any foreign candidate, by the quick gate.

examples:
  mxref calls                      every bug, each until a check rejects it
  mxref calls --name "*cached*"    only those that match
  mxref calls --record --rest      go on from the record with what survived, since the gate asks more now
  mxref calls --list               print the bugs, and which classes of the domain show them

exit codes: 0 every bug is rejected, 1 one survives or the honest layer is rejected, 2 wrong use
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mxref.verification.cli import UsageError
from mxref.verification.cli.options import add_jobs, add_out, add_record, add_seed, note, terminal, writable_folder
from mxref.verification.cli.progress import Meter
from mxref.verification.gate.plan import matches
from mxref.verification.records import record
from mxref.verification.records.sources import digest
from mxref.verification.report.output import new_table, write_json
from mxref.verification.studies import calls
from mxref.verification.studies.calls.catalogue import BUGS
from mxref.verification.studies.calls.layer import Bug
from mxref.verification.studies.calls.run import Judged, NotHonestError, judge_bugs, payload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--name", metavar="PATTERN", action="append", default=[], help="only bugs that match")
    add_seed(parser, "of the domain's cases and every draw")
    parser.add_argument("--list", action="store_true", help="print the bugs and stop")
    add_jobs(parser)
    add_out(parser, "calls.json")
    add_record(parser, "the result of all bugs")
    parser.add_argument(
        "--rest", action="store_true", help="with --record: judge what survived in the record of these very bugs"
    )


def run(arguments: argparse.Namespace) -> int:
    """The command; its exit code.

    Raises:
        UsageError: no bug matches, or the arguments do not fit each other.
    """
    torch.set_num_threads(1)
    bugs = [bug for bug in BUGS if matches(bug.name, arguments.name)]
    if not bugs:
        raise UsageError("no bug matches; --list prints them")
    if arguments.record is not None and arguments.name:
        raise UsageError("--record keeps the result of all bugs; leave out --name")
    if arguments.rest and arguments.record is None:
        raise UsageError("--rest goes on from a record; add --record")
    console = terminal(160)
    known = _known(arguments.record) if arguments.rest else {}
    if arguments.list:
        console.print(_listed(bugs), highlight=False)
        return 0
    open_ = [bug for bug in bugs if bug.name not in known]
    with Meter(len(open_)) as meter:
        try:
            now = judge_bugs(open_, arguments.seed, arguments.jobs, lambda each: meter.advance(each.bug.name))
        except NotHonestError as error:
            print(f"mxref: error: {error}", file=sys.stderr)
            return 1
    found_now = {each.bug.name: each for each in now}
    judged = [found_now.get(bug.name) or Judged(bug, *known[bug.name]) for bug in bugs]
    _print(judged, console)
    found = payload(judged, arguments.seed)
    if arguments.out is not None:
        note(console, "data", write_json(writable_folder(arguments.out) / "calls.json", found))
    if arguments.record is not None:
        note(console, "record", record.write("calls", found, torch.device("cpu"), arguments.record, texts=_texts()))
    return int(not found["passed"])


def _known(folder: Path) -> dict[str, tuple[str, str]]:
    """Check and finding of each bug that the record rejects.

    Raises:
        UsageError: there is no record, or the bugs' sources have changed since.
    """
    path = record.record_path("calls", torch.device("cpu"), folder)
    try:
        kept = record.read(path)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"--rest: {error}") from None
    if kept["digest"] != digest(_texts()):
        raise UsageError(f"--rest: {path} is of other bugs than these; leave out --rest")
    return {bug["name"]: (bug["check"], bug["finding"]) for bug in kept["bugs"] if bug["check"]}


def _texts() -> dict[str, str]:
    """The sources of the bugs."""
    files = sorted(Path(calls.__path__[0]).glob("*.py"))
    return {f"verification/studies/calls/{file.name}": file.read_text(encoding="utf-8") for file in files}


def _listed(bugs: Sequence[Bug]) -> Table:
    table = new_table("bug", "what its author does", "shown by")
    for bug in bugs:
        classes = ", ".join(f"{dimension}: {name}" for dimension, name in bug.shown_by)
        table.add_row(escape(bug.name), escape(bug.mistake), escape(classes or "several calls, or watched memory"))
    return table


def _print(judged: Sequence[Judged], console: Console) -> None:
    """Survivors last, where a reader looks first."""
    table = new_table("bug", "rejected by", "first finding")
    for each in sorted(judged, key=lambda each: not each.killed):
        table.add_row(escape(each.bug.name), each.check or "[red]none[/]", escape(each.finding or each.bug.mistake))
    console.print(table, highlight=False)
    alive = sum(not each.killed for each in judged)
    color = "red" if alive else "green"
    console.print(f"[bold {color}]{alive} survivors[/] of {len(judged)} planted bugs", highlight=False)
