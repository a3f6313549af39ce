"""`mxref bench`: judge each way to compute the layer, then time them beside the composite; what was seen is kept.

Judge this project's ways to compute the layer, then time them beside torch._grouped_mm on bf16 weights and against
the limit measured in the same run. No speed is printed on a red gate.

examples:
  mxref bench                         the main shapes on this GPU: gate, table, bench.json
  mxref bench --large --record        more shapes, kept as evidence, in the history and in the README
  mxref bench --shape gpt-oss         some shapes only
  mxref bench --samples .benchmarks   every sample too, for pytest-benchmark's `list` and `compare`
  mxref bench --rows                  forward and dX over 8 to 4096 rows per expert, with a chart
  mxref bench --host                  how long the host is busy with one eager step
  mxref bench --sustained             base products without a pause, with the GPU's clock and power

whole models:
  mxref bench --model gpt-oss-20b --profile              LoRA steps, packed beside dense; where their time goes
  mxref bench --model gpt-oss-120b --profile --batch 1x512 --largest-batch --record
  mxref bench --model gpt-oss-20b --attention eager --attention flex_attention
  mxref bench --model gpt-oss-20b --parallel fsdp --parallel experts    on two GPUs, beside one
  mxref bench --model gpt-oss-20b --profile --from-disk /scratch --record

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
from mxref.verification.bench.paths import TUNING, about_peers, every_path, peers
from mxref.verification.bench.report import as_json, as_markdown, print_bench
from mxref.verification.bench.rows import PRODUCTS, ROWS, rows_chart
from mxref.verification.bench.timing import EventClock, measure_ceilings
from mxref.verification.bench.workloads import CASES, DENSE, LARGE, MEASURES, QUICK, Shape
from mxref.verification.cli import UsageError
from mxref.verification.cli.options import add_out, add_record, choose_device, positive, terminal, writable_folder
from mxref.verification.cli.own import bench_host, bench_models, bench_sustained
from mxref.verification.cli.own.keeping import keep, show
from mxref.verification.cli.progress import Meter
from mxref.verification.gate.result import describe_device
from mxref.verification.records.record import folder_name, write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="three shapes only: dense, sparse, thin")
    size.add_argument("--rows", action="store_true", help="base products over rows per expert instead, as a chart")
    size.add_argument("--host", action="store_true", help="the host's time of one eager step instead")
    size.add_argument("--sustained", action="store_true", help="base products without a pause, clock and power instead")
    size.add_argument("--large", action="store_true", help="DeepSeek-V4-like shapes too: 40 GB and more")
    parser.add_argument("--shape", metavar="TEXT", action="append", help="only shapes whose name holds it; may repeat")
    parser.add_argument("--no-peers", action="store_true", help="leave out what others wrote")
    parser.add_argument(
        "--peer-tuning",
        metavar="SECONDS",
        type=positive,
        default=int(TUNING),
        help=f"that others' autotuners get for each kernel and shape (default: {TUNING:g})",
    )
    add_out(parser, "bench.json", "gate-report")
    parser.add_argument("--samples", metavar="DIR", type=Path, help="add every sample to pytest-benchmark's storage")
    add_record(parser)
    parser.add_argument("--readme", action="store_true", help=argparse.SUPPRESS)
    bench_models.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """The subcommand; its exit code.

    Raises:
        UsageError: an argument does not fit this machine or the others.
    """
    if arguments.readme:
        raise UsageError("bench --readme is now: mxref evidence --readme")
    if arguments.record is not None and (arguments.quick or arguments.shape):
        raise UsageError("--record keeps a whole benchmark: leave --quick and --shape out")
    bench_models.check(arguments)
    if arguments.model:
        return bench_models.run(arguments)
    if arguments.samples is not None and find_spec("pytest_benchmark") is None:
        raise UsageError("--samples needs pytest-benchmark: pip install pytest-benchmark")
    shapes = _shapes(arguments)
    device = choose_device("cuda", require_gpu=True)
    writable_folder(arguments.out)
    console = terminal(160)
    if arguments.host:
        return bench_host.run(arguments, shapes, device, console)
    if arguments.sustained:
        return bench_sustained.run(arguments, shapes, device, console)
    bench = _measure(arguments, shapes, device)
    print_bench(bench, console)
    if bench.green:
        show(_kept(bench, arguments, device), console)
    return bench.exit_code


def _shapes(arguments: argparse.Namespace) -> tuple[Shape, ...]:
    every = ROWS if arguments.rows else CASES + LARGE
    if not arguments.shape:
        return every if arguments.rows or arguments.large else QUICK if arguments.quick else CASES
    shapes = tuple(shape for shape in every if any(text in shape.name for text in arguments.shape))
    if not shapes:
        names = ", ".join(shape.name for shape in every)
        raise UsageError(f"--shape {' '.join(arguments.shape)} matches none of: {names}")
    return shapes


def _measure(arguments: argparse.Namespace, shapes: tuple[Shape, ...], device: torch.device) -> Bench:
    others, absent = ([], {}) if arguments.no_peers else peers(arguments.peer_tuning)
    paths, clock = every_path(others), EventClock(device)
    if arguments.rows:
        paths = [path for path in paths if path.name in ("automatic", "repacked") or path.package == "humming-kernels"]
    with Meter(len(shapes)) as meter:
        meter.show("gate: " + ", ".join(path.name for path in paths if path.ours))
        told = about_peers(paths) | absent
        bench = Bench(describe_device(device), gate_paths(paths, device), Effort(), peers=told)
        if bench.green and not arguments.rows:
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
            measures=PRODUCTS if arguments.rows else MEASURES,
        )


def _kept(bench: Bench, arguments: argparse.Namespace, device: torch.device) -> dict[str, Path]:
    """Write what was asked for: what it is, and where."""
    if arguments.rows:
        return keep("rows", as_json(bench), arguments, device, chart=rows_chart)
    kept = keep("bench", as_json(bench), arguments, device, page=as_markdown)
    if arguments.samples is not None:
        from mxref.verification.bench.samples import keep_samples  # pytest-benchmark is not always installed

        keep_samples(bench, arguments.samples, folder_name(device))
        kept["samples"] = arguments.samples
    if "evidence" in kept:
        name = f"history/{bench.started.replace(':', '')}"
        kept["history"] = write("history", ratios_of(bench), device, arguments.record, name=name)
    return kept
