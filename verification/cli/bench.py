"""`mxref bench`: judge each way to compute the layer, then time them beside the composite; what was seen is kept.

Judge this project's ways to compute the layer, then time them beside torch._grouped_mm on bf16 weights and against
the limit measured in the same run. No speed is printed on a red gate.

examples:
  mxref bench                         the main shapes on this GPU: gate, table, bench.json
  mxref bench --large --record        more shapes, kept as evidence, in the history and in the README
  mxref bench --shape gpt-oss         some shapes only
  mxref bench --samples .benchmarks   every sample too, for pytest-benchmark's `list` and `compare`

exit codes: 0 timed, 1 the gate is red or one of our ways failed, 2 wrong use
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch

from mxref.verification.bench.benchmark import Bench, gate_paths, run_benchmark
from mxref.verification.bench.first_call import first_call
from mxref.verification.bench.history import ratios_of
from mxref.verification.bench.pairs import Effort
from mxref.verification.bench.paths import every_path
from mxref.verification.bench.report import as_json, as_markdown, print_bench
from mxref.verification.bench.timing import EventClock, measure_ceilings
from mxref.verification.bench.workloads import CASES, DENSE, LARGE, QUICK, Shape
from mxref.verification.cli.options import add_out, add_record, choose_device, made, note, terminal
from mxref.verification.cli.progress import Meter
from mxref.verification.cli.usage import UsageError
from mxref.verification.gate.result import describe_device
from mxref.verification.records.readme import update_readme
from mxref.verification.records.record import EVIDENCE, folder_name, write
from mxref.verification.report.output import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="three shapes only: dense, sparse, thin")
    size.add_argument("--large", action="store_true", help="DeepSeek-V4-like shapes too: 40 GB and more")
    parser.add_argument("--shape", metavar="TEXT", action="append", help="only shapes whose name holds it; may repeat")
    parser.add_argument("--no-peers", action="store_true", help="leave out what others wrote")
    add_out(parser, "bench.json", "gate-report")
    parser.add_argument("--samples", metavar="DIR", type=Path, help="add every sample to pytest-benchmark's storage")
    add_record(parser)
    parser.add_argument("--readme", action="store_true", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """The subcommand; its exit code.

    Raises:
        UsageError: an argument does not fit this machine or the others.
    """
    if arguments.readme:
        raise UsageError("bench --readme is now: mxref evidence --readme")
    if arguments.record is not None and (arguments.quick or arguments.shape):
        raise UsageError("--record keeps a whole benchmark: leave --quick and --shape out")
    if arguments.samples is not None and find_spec("pytest_benchmark") is None:
        raise UsageError("--samples needs pytest-benchmark: pip install pytest-benchmark")
    shapes = _shapes(arguments)
    device = choose_device("cuda", require_gpu=True)
    made(arguments.out)
    bench = _measure(shapes, device, peers=not arguments.no_peers)
    console = terminal(160)
    print_bench(bench, console)
    if bench.green:
        for what, path in _kept(bench, arguments, device).items():
            note(console, what, path)
    return bench.exit_code


def _shapes(arguments: argparse.Namespace) -> tuple[Shape, ...]:
    if not arguments.shape:
        return QUICK if arguments.quick else CASES + (LARGE if arguments.large else ())
    every = CASES + LARGE
    shapes = tuple(shape for shape in every if any(text in shape.name for text in arguments.shape))
    if not shapes:
        names = ", ".join(shape.name for shape in every)
        raise UsageError(f"--shape {' '.join(arguments.shape)} matches none of: {names}")
    return shapes


def _measure(shapes: tuple[Shape, ...], device: torch.device, peers: bool) -> Bench:
    paths, clock = every_path(installed=peers), EventClock(device)
    with Meter(len(shapes)) as meter:
        meter.show("gate: " + ", ".join(path.name for path in paths if path.ours))
        bench = Bench(describe_device(device), gate_paths(paths, device), Effort())
        if bench.green:
            meter.show("timing the first step of a fresh process")
            bench.first_call = first_call(DENSE, device)
        return run_benchmark(
            bench,
            shapes,
            paths,
            device,
            clock,
            lambda: measure_ceilings(clock, device),
            on_shape=lambda shape: meter.show(shape.name, done=shapes.index(shape)),
        )


def _kept(bench: Bench, arguments: argparse.Namespace, device: torch.device) -> dict[str, Path]:
    """Write what was asked for: what it is, and where."""
    found = as_json(bench)
    kept = {"data": write_json(arguments.out / "bench.json", found)}
    if arguments.samples is not None:
        from mxref.verification.bench.samples import keep_samples  # pytest-benchmark is not always installed

        keep_samples(bench, arguments.samples, folder_name(device))
        kept["samples"] = arguments.samples
    if arguments.record is not None and bench.exit_code == 0:
        kept["evidence"] = write("bench", found, device, arguments.record, page=as_markdown)
        name = f"history/{bench.started.replace(':', '')}"
        kept["history"] = write("history", ratios_of(bench), device, arguments.record, name=name)
        if arguments.record.resolve() == EVIDENCE:
            kept["README"] = update_readme()
    return kept
