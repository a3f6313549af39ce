"""`mxref scoreboard`: judge every implementation that can be found, and print the table.

Judge this project's kernels and implementations from elsewhere by the same checks, each in a process of its own, and
print one table with the first counterexample of every failure.

examples:
  mxref scoreboard                                       everything that is installed, quick suite
  mxref scoreboard --candidates axolotl,grouped_mm       two of them
  mxref scoreboard --record                              kept as evidence (needs a GPU)
  mxref scoreboard --candidates humming --record         a line of the recorded table again

exit codes: 0 the comparison ran, whatever it found; 2 wrong use
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mxref.verification.candidates.known import IMPLEMENTATIONS, implementation, is_own
from mxref.verification.cases.scope import Scope
from mxref.verification.cli import UsageError, options
from mxref.verification.cli.progress import Meter
from mxref.verification.gate.plan import plan
from mxref.verification.records import record
from mxref.verification.records.kernel_sources import kernel_sources
from mxref.verification.records.sources import digest
from mxref.verification.records.versions import versions
from mxref.verification.studies.scoreboard.report import (
    as_json,
    as_markdown,
    joined,
    print_board,
    write,
)
from mxref.verification.studies.scoreboard.run import Board, Row, empty_board, run_scoreboard


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--candidates", metavar="NAMES", help="comma-separated, module:callable too (default: all but golden)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="full", action="store_false", default=False, help="the quick suite (default)")
    size.add_argument("--full", action="store_true", help="the suite for a release: more and larger cases")
    parser.add_argument(
        "--case", metavar="PATTERN", action="append", help="cases or checks that match; may be repeated"
    )
    options.add_seed(parser)
    options.add_device(parser)
    options.add_processes(parser, alone="1")
    options.add_out(parser, "scoreboard.json and scoreboard.md", "gate-report")
    options.add_record(parser, "the table of this GPU")


def run(arguments: argparse.Namespace) -> int:
    """The command; its exit code.

    Raises:
        UsageError: an argument does not fit this machine or the others.
    """
    device = options.choose_device(arguments.device)
    names = _names(arguments.candidates)
    if arguments.record is not None and (device.type != "cuda" or arguments.case):
        raise UsageError("--record keeps what a GPU is asked in the whole suite; leave out --case")
    options.writable_folder(arguments.out)
    _check_cases(names, arguments, device)
    board = empty_board(device, full=arguments.full, seed=arguments.seed, only=arguments.case or ())
    path = record.record_path("scoreboard", device, arguments.record) if arguments.record is not None else None
    added = arguments.candidates is not None
    if path is not None and added:
        recorded_rows(board, path)  # raises before anyone is judged
    _judge(board, names, device, arguments)
    console = options.terminal(120)
    print_board(board, console)
    data, page = write(board, arguments.out)
    options.note(console, "table", page)
    options.note(console, "data", data)
    if path is not None:
        board = joined(board, recorded_rows(board, path)) if added else board  # others may have added theirs meanwhile
        kept = record.write(
            "scoreboard", as_json(board), device, arguments.record, page=lambda entry: as_markdown(board)
        )
        options.note(console, "evidence", kept)
    return 0


def recorded_rows(board: Board, path: Path) -> list[Row]:
    """The rows of a record that a table can be added to; none where there is no record.

    Raises:
        UsageError: the record is of other sources or versions, or of other cases.
    """
    if not path.exists():
        return []
    entry = record.read(path)
    now = {"digest": digest(kernel_sources()), "versions": versions(), "asked": board.asked, "only": board.only}
    other = [name for name, value in now.items() if entry.get(name) != value]
    if other:
        raise UsageError(f"{path} has another {', another '.join(other)}; record the whole table")
    return [Row(**row) for row in entry["rows"]]


def _names(text: str | None) -> list[str]:
    if text is None:
        return [name for name in IMPLEMENTATIONS if name != "golden"]
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    try:
        for name in names:
            implementation(name)
    except ValueError as error:
        raise UsageError(f"--candidates: {error}") from None
    return names


def _check_cases(names: list[str], arguments: argparse.Namespace, device: torch.device) -> None:
    items = plan(Scope("full" if arguments.full else "quick", device.type, arguments.seed), own=any(map(is_own, names)))
    if not any(item.fits(arguments.case or ()) for item in items):
        raise UsageError(f"--case {' '.join(arguments.case)} matches no case; mxref gate --list prints them")


def _judge(board: Board, names: list[str], device: torch.device, arguments: argparse.Namespace) -> None:
    with Meter() as meter:
        run_scoreboard(
            board,
            names,
            device,
            processes=options.processes_on(device, arguments.processes),
            on_item=lambda name, done, total, case: meter.show(f"{name}: {case}", done, total),
        )
