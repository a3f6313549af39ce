"""`mxref sanitize`: run the kernels under compute-sanitizer and Triton's concurrency sanitizer.

Run both passes of the kernels on the smallest cases under tools that watch every access: compute-sanitizer's
memcheck, racecheck and initcheck, and Triton's ConSan. Each tool has a process of its own, all at once.

examples:
  mxref sanitize                        every tool
  mxref sanitize --tool memcheck        one of them
  mxref sanitize --self-test            also a planted mistake under each tool, which it must find

exit codes: 0 no tool finds anything in the kernels (and each finds its planted mistake), 1 not so, 2 wrong use
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rich.markup import escape
from rich.table import Table

from mxref.verification.cli import UsageError
from mxref.verification.cli.options import add_out, add_record, choose_device, note, positive, terminal, writable_folder
from mxref.verification.cli.progress import Meter
from mxref.verification.records import record
from mxref.verification.report.output import new_table
from mxref.verification.studies.sanitizers.run import payload, watch
from mxref.verification.studies.sanitizers.tools import TOOLS, Report, Tool
from mxref.verification.studies.sanitizers.workload import KERNELS

Runs = Sequence[tuple[Tool, str, Report]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--tool", choices=tuple(TOOLS), action="append", help="only these (default: all)")
    parser.add_argument("--self-test", action="store_true", help="also run a planted mistake under each tool")
    parser.add_argument("--seconds", metavar="N", type=positive, default=900, help="for each run (default: 900)")
    add_out(parser, "what the tools print")
    add_record(parser, "the result of all tools")


def run(arguments: argparse.Namespace) -> int:
    """The command; its exit code.

    Raises:
        UsageError: there is no GPU, or the arguments do not fit each other.
    """
    if arguments.record is not None and arguments.tool:
        raise UsageError("--record keeps the result of all tools; leave out --tool")
    device = choose_device("cuda")
    tools = [TOOLS[name] for name in dict.fromkeys(arguments.tool or TOOLS)]
    programs = [(tool, tool.planted) for tool in tools if arguments.self_test] + [(tool, KERNELS) for tool in tools]
    console = terminal()
    runs: list[tuple[Tool, str, Report]] = []
    with Meter(len(programs)) as meter, ThreadPoolExecutor(len(programs)) as pool:  # each waits for a process
        meter.show("every program under its tool")
        watched = [pool.submit(watch, tool, work, arguments.seconds) for tool, work in programs]
        for (tool, work), future in zip(programs, watched, strict=True):
            report, output = future.result()
            runs.append((tool, work, report))
            meter.advance(f"{tool.name}: {work}")
            if arguments.out is not None:
                name = f"{tool.name}-{work.replace(' ', '-')}.txt"
                (writable_folder(arguments.out) / name).write_text(output, encoding="utf-8")
    console.print(_table(runs), highlight=False)
    found = payload(runs)
    if arguments.record is not None:
        note(console, "record", record.write("sanitize", found, device, arguments.record))
    return int(not found["passed"])


def _table(runs: Runs) -> Table:
    """A line a finding; one for each run without any."""
    table = new_table("tool", "program", ">times", "finding")
    for tool, work, report in runs:
        color = "red" if report.problem or report.clean != (work == KERNELS) else "green"
        nothing = "; cannot watch ".join(filter(None, ["nothing found", ", ".join(report.unwatched)]))
        told = list(report.findings.items()) or [(report.problem or nothing, 0)]
        for finding, times in told:
            table.add_row(tool.name, work, str(times or ""), f"[{color}]{escape(finding)}[/]")
    return table
