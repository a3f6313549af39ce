"""`mxref scoreboard`: judge every implementation that can be found, and print the table."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mxref.verification.cli.options import choose_device, matches, positive, seed
from mxref.verification.cli.usage import UsageError
from mxref.verification.records.record import EVIDENCE

if TYPE_CHECKING:
    import torch

    from mxref.verification.studies.scoreboard.run import Board

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = (
    "Judge this project's kernels and implementations from elsewhere by the same steps, each in a "
    "process of its own, and print one table with the first counterexample of every failure."
)

EPILOG = """\
examples:
  mxref scoreboard                                       everything that is installed, quick suite
  mxref scoreboard --candidates axolotl,grouped_mm       two of them
  mxref scoreboard --full --record                       the release suite, kept as evidence (needs a GPU)

exit codes: 0 the comparison ran, whatever it found; 2 wrong use
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--candidates", metavar="NAMES", help="comma-separated, module:callable too (default: all but golden)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="full", action="store_false", default=False, help="the quick suite (default)")
    size.add_argument("--full", action="store_true", help="the suite for a release: more and larger cases")
    parser.add_argument("--case", metavar="PATTERN", action="append", help="only cases that match; may be repeated")
    parser.add_argument("--seed", type=seed, default=0, help="seed of every draw (default: 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument(
        "--processes",
        metavar="N",
        type=positive,
        help="that share an implementation's steps (default: 1; up to 8 on a GPU)",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("gate-report"), help="for scoreboard.json and scoreboard.md"
    )
    parser.add_argument(
        "--record", metavar="DIR", type=Path, nargs="?", const=EVIDENCE, help="keep the result as evidence of this GPU"
    )


def run(arguments: argparse.Namespace) -> int:
    """The subcommand; its exit code.

    Raises:
        UsageError: an argument does not fit this machine or the others.
    """
    device = choose_device(arguments.device)
    from rich.console import Console

    from mxref.verification.records.record import write
    from mxref.verification.studies.scoreboard import report as scoreboard_report

    names = _names(arguments.candidates)
    if arguments.record is not None and (device.type != "cuda" or arguments.candidates or arguments.case):
        raise UsageError("--record keeps the whole table of a GPU; leave out what narrows it")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {arguments.out}: {error.strerror or error}") from None
    _check_cases(arguments, device)
    board = _judge(names, device, arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    scoreboard_report.print_board(board, console)
    data, page = scoreboard_report.write(board, arguments.out)
    console.print(f"table: {page}   data: {data}", style="bright_black", soft_wrap=True, highlight=False)
    if arguments.record is not None:
        found, page_text = scoreboard_report.as_json(board), scoreboard_report.as_markdown(board)
        kept = write("scoreboard", found, device, arguments.record, page=lambda _: page_text)
        console.print(f"evidence: {kept}", style="bright_black", soft_wrap=True, highlight=False)
    return 0


def _names(text: str | None) -> list[str]:
    from mxref.verification.candidates.known import ENTRIES, entry

    if text is None:
        return [name for name in ENTRIES if name != "golden"]
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    try:
        for name in names:
            entry(name)
    except ValueError as error:
        raise UsageError(f"--candidates: {error}") from None
    return names


def _check_cases(arguments: argparse.Namespace, device: torch.device) -> None:
    from mxref.verification.gate.plan import suite_steps

    steps = suite_steps(device, arguments.full, arguments.seed, every_guard=True)
    if not any(matches(step.case, arguments.case or ()) for step in steps):
        raise UsageError(f"--case {' '.join(arguments.case)} matches no case; mxref gate --list prints them")


def _judge(names: list[str], device: torch.device, arguments: argparse.Namespace) -> Board:
    """Run behind a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from mxref.verification.studies.scoreboard.run import run_scoreboard

    columns = (
        SpinnerColumn(), TextColumn("{task.fields[name]:>14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.description}", style="bright_black"),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None, name="")

        def on_step(name: str, done: int, total: int, case: str) -> None:
            progress.update(task, completed=done, total=total, description=case, name=name)

        return run_scoreboard(
            names,
            device,
            full=arguments.full,
            seed=arguments.seed,
            only=arguments.case or (),
            processes=_processes(arguments.processes, device),
            on_step=on_step,
        )


def _processes(wanted: int | None, device: torch.device) -> int:
    if wanted is not None and not 1 <= wanted <= 64:
        raise UsageError(f"--processes is {wanted}; expected 1 to 64")
    return wanted or (1 if device.type == "cpu" else max(1, min(8, (os.cpu_count() or 1) // 2)))
