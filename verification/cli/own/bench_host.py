"""`mxref bench --host`: the host's time of one eager step of the layer, beside the composite's."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime

import torch
from rich.console import Console
from rich.table import Table

from mxref.verification.bench.benchmark import gate_paths
from mxref.verification.bench.host import host_times
from mxref.verification.bench.paths import our_paths
from mxref.verification.bench.summary import milliseconds_and_ratio
from mxref.verification.bench.workloads import Shape
from mxref.verification.cli.own.keeping import keep, plain_rows, show, tell_red
from mxref.verification.cli.progress import Meter


def run(arguments: argparse.Namespace, shapes: tuple[Shape, ...], device: torch.device, console: Console) -> int:
    """Judge the way that callers get, time it, show it, keep it; the exit code."""
    started, ours = datetime.now(UTC), next(path for path in our_paths() if path.name == "automatic")
    if tell_red(gate_paths([ours], device), console):
        return 1
    with Meter(len(shapes)) as meter:
        times = host_times(shapes, ours, device, on_shape=lambda shape: meter.show(shape.name, shapes.index(shape)))
    rows = plain_rows(times)
    table = Table("shape", "composite, ms", "ours, ms", "ratio", title="host time of one eager step", box=None)
    for row in rows:
        table.add_row(str(row["shape"]), *milliseconds_and_ratio([row["composite"], row["ours"]]))
    console.print(table)
    found = {"passed": True, "started": started.strftime("%Y-%m-%dT%H:%M:%SZ"), "rows": rows}
    show(keep("host", found, arguments, device), console)
    return 0
