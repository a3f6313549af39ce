"""`mxref tune`: time every tiling offline, beside the one that the committed table chooses.

Time a whole training step under every tiling that fits this GPU, shape by shape, and print the 5 fastest beside the
one that kernels/device/configs.py has; then what it costs to pin one tiling for all of them, so that a row's bits do
not depend on the batch. Nothing is written: the table is source, and a change to it goes through the gate like any
other.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.table import Table

from mxref.kernels.device.launch import architecture
from mxref.verification.bench.timing import EventClock
from mxref.verification.bench.tuning import Pinned, Timing, candidates, compile_ahead, pinned_costs, tune_shape
from mxref.verification.bench.workloads import CASES
from mxref.verification.cases.small import usual_dtype
from mxref.verification.cli import UsageError
from mxref.verification.cli.options import add_jobs, choose_device, terminal
from mxref.verification.cli.progress import Meter
from mxref.verification.report.output import new_table

_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--shape", metavar="TEXT", action="append", help="only shapes whose name holds it; may repeat")
    add_jobs(parser, "processes that compile ahead")


def run(arguments: argparse.Namespace) -> int:
    """The subcommand; its exit code.

    Raises:
        UsageError: there is no GPU, or no such shape.
    """
    device = choose_device("cuda", require_gpu=True)
    wanted = arguments.shape or [""]
    shapes = [shape for shape in CASES if any(text in shape.name for text in wanted)]
    if not shapes:
        raise UsageError(f"--shape {' '.join(wanted)} matches none of: {', '.join(shape.name for shape in CASES)}")
    console, clock = terminal(120), EventClock(device)
    configs = candidates(architecture(device), usual_dtype(device.type))
    with Meter(len(configs) * len(shapes)) as meter:
        meter.show(f"compiling {len(configs)} tilings")
        compile_ahead(shapes, device, configs, arguments.jobs)
        tuned = []
        for shape in shapes:
            meter.show(shape.name)
            tuned.append(tune_shape(shape, device, clock, configs, on_config=lambda config: meter.advance(str(config))))
            console.print(table(tuned[-1]))
    if len(shapes) > 1:
        console.print(pinned_table(pinned_costs(tuned)))
    return 0


def table(timings: list[Timing]) -> Table:
    """The fastest tilings of one shape, and the committed one with its rank."""
    committed = next(timing for timing in timings if timing.committed)
    shown = new_table(">rank", "tiling", ">ms", ">÷ committed", title=f"{committed.shape} ({committed.shape_class})")
    for rank, timing in enumerate(timings, 1):
        if rank <= _SHOWN or timing.committed:
            cells = (str(rank), str(timing.config), f"{timing.seconds * 1e3:.3f}")
            shown.add_row(*cells, f"{timing.seconds / committed.seconds:.2f}", style="bold" if timing.committed else "")
    return shown


def pinned_table(costs: Sequence[Pinned]) -> Table:
    """The cheapest tilings for a caller who pins one."""
    title = "one tiling for all of these shapes, ÷ committed"
    shown = new_table("tiling", ">at worst", ">on average", title=title)
    for cost in costs[:_SHOWN]:
        shown.add_row(str(cost.config), f"{cost.worst:.2f}", f"{cost.mean:.2f}")
    return shown
