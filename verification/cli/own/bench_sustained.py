"""`mxref bench --sustained`: base products without a pause, with the GPU's clock and power, beside the composite's."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime

import torch
from rich.console import Console
from rich.table import Table

from mxref.verification.bench.benchmark import gate_paths
from mxref.verification.bench.paths import our_paths
from mxref.verification.bench.summary import SUSTAINED, sustained_cells
from mxref.verification.bench.sustained import readings, sustained
from mxref.verification.bench.workloads import Shape
from mxref.verification.cli import UsageError
from mxref.verification.cli.own.keeping import keep, plain_rows, show, tell_red
from mxref.verification.cli.progress import Meter


def run(arguments: argparse.Namespace, shapes: tuple[Shape, ...], device: torch.device, console: Console) -> int:
    """Judge the ways that callers get, time them, show it, keep it; the exit code.

    Raises:
        UsageError: there is no nvidia-smi.
    """
    started = datetime.now(UTC)
    ours = [path for path in our_paths() if path.name in ("automatic", "repacked")]
    if tell_red(gate_paths(ours, device), console):
        return 1
    with Meter(len(shapes)) as meter:
        try:
            found = sustained(
                shapes,
                ours,
                device,
                readings(device),
                on_shape=lambda shape: meter.show(shape.name, shapes.index(shape)),
            )
        except FileNotFoundError as error:
            raise UsageError("--sustained reads clock and power from nvidia-smi, which is not on the PATH") from error
    rows = plain_rows(found)
    table = Table(*SUSTAINED, title="base products without a pause", box=None)
    for cells in sustained_cells(rows):
        table.add_row(*cells)
    console.print(table)
    kept = {"passed": True, "started": started.strftime("%Y-%m-%dT%H:%M:%SZ"), "rows": rows}
    show(keep("sustained", kept, arguments, device), console)
    return 0
