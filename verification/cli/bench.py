"""`mxref bench`: the gate, then every way to compute the layer timed beside the composite."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mxref.verification.cli.options import EVIDENCE, choose_device
from mxref.verification.cli.usage import UsageError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from mxref.verification.bench.benchmark import Bench

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

README = EVIDENCE.parent.parent / "README.md"

DESCRIPTION = (
    "Judge this project's ways to compute the layer, then time them beside torch._grouped_mm on bf16 "
    "weights and against the limit measured in the same run. No speed is printed on a red gate."
)

EPILOG = """\
examples:
  mxref bench                     the main shapes on this GPU: gate, table, bench.json
  mxref bench --record            the same, kept as evidence, and put into the README
  mxref bench --shape gpt-oss     some shapes only
  mxref bench --readme            no timing: the README's table again, from the evidence

exit codes: 0 timed, 1 the gate is red or one of our ways failed, 2 wrong use
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="three shapes only: dense, sparse, thin")
    size.add_argument("--large", action="store_true", help="DeepSeek-V4-like shapes too: 40 GB and more")
    parser.add_argument("--shape", metavar="TEXT", action="append", help="only shapes whose name holds it; may repeat")
    parser.add_argument("--no-peers", action="store_true", help="leave out what others wrote")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("gate-report"), help="for bench.json (default: gate-report)"
    )
    parser.add_argument(
        "--record", metavar="DIR", type=Path, nargs="?", const=EVIDENCE, help="keep the result as evidence"
    )
    parser.add_argument("--readme", action="store_true", help="only write the README's table from the evidence")


def run(arguments: argparse.Namespace) -> int:
    """The subcommand; its exit code.

    Raises:
        UsageError: an argument does not fit this machine or the others.
    """
    if arguments.readme:
        return _readme()
    partial = bool(arguments.quick or arguments.shape)
    if arguments.record is not None and partial:
        raise UsageError("--record keeps a whole benchmark: leave --quick and --shape out")
    device = choose_device("cuda", require_gpu=True)
    from rich.console import Console

    from mxref.verification.bench import report

    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {arguments.out}: {error.strerror or error}") from None
    bench = _measure(arguments, device)
    console = Console(width=None if sys.stdout.isatty() else 160)
    report.print_bench(bench, console)
    if bench.green:
        data = arguments.out / "bench.json"
        data.write_text(report.dumps(bench), encoding="utf-8")
        console.print(f"data: {data}", style="bright_black", soft_wrap=True, highlight=False)
    if arguments.record is not None and bench.exit_code == 0:
        kept = report.record(bench, arguments.record)
        console.print(f"evidence: {kept}", style="bright_black", soft_wrap=True, highlight=False)
        if arguments.record.resolve() == EVIDENCE:
            _readme()
    return bench.exit_code


def _readme() -> int:
    from mxref.verification.bench import report

    if not README.is_file() or not report.update_readme(README):
        raise UsageError(f"{README} has no {report.BEGIN} … {report.END} to fill")
    print(f"written: {README}")
    return 0


def _measure(arguments: argparse.Namespace, device: torch.device) -> Bench:
    """Run behind a line on stderr that says where it is."""
    from rich.console import Console

    from mxref.verification.bench import workloads
    from mxref.verification.bench.benchmark import Bench, gate_paths, run_benchmark
    from mxref.verification.bench.first_call import first_call
    from mxref.verification.bench.paths import every_path
    from mxref.verification.bench.racing import Effort
    from mxref.verification.bench.timing import clock_for, measure_ceilings
    from mxref.verification.gate.result import describe_device

    shapes = workloads.QUICK if arguments.quick else workloads.CASES + (workloads.LARGE if arguments.large else ())
    if arguments.shape:
        every = workloads.CASES + workloads.LARGE
        shapes = tuple(shape for shape in every if any(text in shape.name for text in arguments.shape))
        if not shapes:
            names = ", ".join(shape.name for shape in every)
            raise UsageError(f"--shape {' '.join(arguments.shape)} matches none of: {names}")
    errors = Console(stderr=True)
    paths = every_path(installed=not arguments.no_peers)
    _say(errors, "gate: " + ", ".join(path.name for path in paths if path.ours))
    bench = Bench(describe_device(device), gate_paths(paths, device), Effort())
    if not bench.green:
        return bench
    _say(errors, "timing: the first step of a fresh process")
    bench.first_call = first_call(workloads.DENSE, device)
    clock = clock_for(device)
    return run_benchmark(
        bench,
        shapes,
        paths,
        device,
        clock,
        lambda: measure_ceilings(clock, device),
        on_shape=lambda shape: _say(errors, f"timing: {shape.name}"),
    )


def _say(console: Console, text: str) -> None:
    console.print(text, style="bright_black", highlight=False)
