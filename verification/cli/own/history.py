"""`mxref history`: speed over commits, as ratios; fails on a slowdown beyond the noise.

Hold the latest recorded benchmark of each GPU against the best of all earlier ones, on its ratios to the composite
and to the limit, and fail where it is slower beyond the noise.

The band: the noise of both runs, each the range of a ratio's rounds over their median, and at least 5 %; for the
limit's ratio also what the two runs' limits differ by.

exit codes: 0 nothing is slower, 1 something is, 2 wrong use
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mxref.verification.bench.history import Change, Run, as_entry, judge
from mxref.verification.bench.plots import save_history
from mxref.verification.cli import UsageError
from mxref.verification.cli.options import note, terminal, writable_folder
from mxref.verification.clone import EVIDENCE
from mxref.verification.records.record import KINDS, read

_SHOWN = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--evidence", metavar="DIR", type=Path, default=EVIDENCE, help="one folder a GPU")
    parser.add_argument("--gpu", metavar="NAME", help="only the GPUs whose folder name holds it")
    parser.add_argument("--baseline", metavar="START", help="the run to hold against: a date, commit or digest")
    parser.add_argument("--plot", metavar="DIR", type=Path, help="for history-<gpu>.png")
    parser.add_argument("--verbose", action="store_true", help="print every ratio, not only what changed")


def run(arguments: argparse.Namespace) -> int:
    """The subcommand; its exit code.

    Raises:
        UsageError: there is nothing to show, a record is damaged, or --baseline names no run.
    """
    try:
        history = load_history(arguments.evidence)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from None
    history = {gpu: entries for gpu, entries in history.items() if (arguments.gpu or "") in gpu}
    if not history:
        raise UsageError(f"no benchmark is recorded below {arguments.evidence}; on a GPU: {KINDS['history'].command}")
    console = terminal()
    failed = False
    for gpu, entries in history.items():
        try:
            changes = judge(entries, arguments.baseline)
        except ValueError as error:
            raise UsageError(f"--baseline: {gpu}: {error}") from None
        _print(gpu, entries, changes, arguments.verbose, console)
        failed |= any(change.slower for change in changes)
        if arguments.plot is not None:
            picture = writable_folder(arguments.plot, "--plot") / f"history-{gpu}.png"
            save_history(entries, str(picture))
            note(console, "plot", picture)
    return int(failed)


def load_history(root: Path = EVIDENCE) -> dict[str, list[Run]]:
    """Every kept benchmark by GPU folder, oldest first.

    Raises:
        ValueError: a file is no record, or was changed by hand.
    """
    history: dict[str, list[Run]] = {}
    for path in sorted(root.glob("*/history/*.json")):
        history.setdefault(path.parent.parent.name, []).append(as_entry(read(path)))
    return {gpu: sorted(entries, key=lambda entry: entry.started) for gpu, entries in history.items()}


def _print(gpu: str, entries: list[Run], changes: list[Change], verbose: bool, console: Console) -> None:
    """The ratios of the way that callers get in the last runs; then what changed."""
    shown = entries[-_SHOWN:]
    table = Table(title=f"{gpu}: automatic, step (base): time over the composite's", title_justify="left", box=None)
    table.add_column("shape", no_wrap=True)
    for entry in shown:
        table.add_column(entry.name.replace(" ", "\n"), justify="right", no_wrap=True)
    for shape in dict.fromkeys(shape for entry in shown for shape, _, path in entry.rows if path == "automatic"):
        table.add_row(shape, *[_pair(entry, shape) for entry in shown])
    console.print(table, highlight=False)
    for change in changes:
        style = "red" if change.slower else "green" if change.faster else "bright_black"
        if verbose or change.slower or change.faster:
            console.print(str(change), style=style, highlight=False)
    slower = sum(change.slower for change in changes)
    if not changes:
        console.print("one run, nothing to hold it against", style="bright_black")
    else:
        said = f"{slower} of {len(changes)} ratios slower beyond the noise"
        console.print(said, style="bold red" if slower else "bold green", highlight=False)


def _pair(entry: Run, shape: str) -> str:
    cells = [entry.rows.get((shape, measure, "automatic")) for measure in ("step", "base")]
    step, base = (f"{row['ratio']:.2f}" if row and row["status"] == "ok" else "–" for row in cells)
    return f"{step} ({base})"
