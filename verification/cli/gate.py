"""`mxref gate`: judge an implementation, print the verdict, write the report.

Judge an implementation against the golden model: exhaustive decode, integer fixtures by bits, and derived error
intervals on a grid of cases.

examples:
  mxref gate                                    judge this project's kernels, quick suite
  mxref gate --kernel my_kernels.py:my_layer    judge your own differentiable callable
  mxref gate --weights ./gpt-oss-20b --layers 0 judge on a checkpoint's expert weights
  mxref gate --case 'integer*' --kernel golden  a few cases only; the golden model against itself
  mxref gate --distributed --step my.py:train_step    judge a training step on 1, 2 and 4 ranks
  mxref gate --kernel my.py:layer --shape 32,2880,5760,256,4,16 --dtype bfloat16    a problem of your own

exit codes: 0 pass, within what is declared by --covers; 1 a failure, or something declined without having been
declared; 2 wrong use, or a fault that is not the candidate's
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console

from mxref.verification.candidates.known import is_own
from mxref.verification.candidates.processes import cores
from mxref.verification.cli import UsageError, options
from mxref.verification.cli.progress import Meter
from mxref.verification.clone import EVIDENCE, IS_CLONE, LeftOutError, of_a_clone
from mxref.verification.gate.isolated import TIMEOUT, judge_apart, list_items
from mxref.verification.gate.order import Order
from mxref.verification.gate.process import ItemInfo, Refused
from mxref.verification.gate.projections import Projections
from mxref.verification.gate.result import GateResult
from mxref.verification.report.output import new_table
from mxref.verification.report.page import write
from mxref.verification.report.terminal import print_result

_OF_A_CLONE = {
    "distributed": "cli.own.gate_steps",
    "record": "cli.own.gate_records",
    "accept_baseline": "cli.own.gate_records",
}
"""Options that the wheel leaves out, and the module of each."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    what = parser.add_argument_group("what is judged")
    what.add_argument(
        "--kernel",
        metavar="SPEC",
        default="shipped",
        help="shipped (default), golden, composite, module:callable or path/to/file.py:callable",
    )
    what.add_argument(
        "--points", metavar="NAMES", help="declare other rounding points, comma-separated; 'contract' for none"
    )
    what.add_argument("--accumulation", metavar="NAME", help="declare how fp32 sums run, for instance fp32-blocks-32")
    what.add_argument(
        "--covers",
        metavar="SUBSET",
        help="declare the part of the domain that is supported, for instance 'forward, gates=none, rank>=16'",
    )
    how = parser.add_argument_group("by which cases")
    size = how.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", dest="full", action="store_false", default=False, help="the suite for every commit (default)"
    )
    size.add_argument("--full", action="store_true", help="the suite for a release: more and larger cases")
    how.add_argument("--weights", metavar="PATH", type=Path, help="a checkpoint (file or folder) for drawn weights")
    how.add_argument(
        "--layers", metavar="LIST", help="with --weights: layers such as 0,3-5, or all (default: the first)"
    )
    how.add_argument("--experts", metavar="N", help="with --weights: experts of each projection, or all (default: 4)")
    how.add_argument(
        "--case", metavar="PATTERN", action="append", help="only cases, or checks, that match; may be repeated"
    )
    options.add_seed(how)
    how.add_argument("--list", action="store_true", help="print what this candidate would be asked, and stop")
    how.add_argument("--rerun", metavar="ID", action="append", help="only the item of this identifier; may be repeated")
    how.add_argument(
        "--shape", metavar="E,K,N,M,k,r", type=_shape, help="a problem of your own instead: experts to rank"
    )
    how.add_argument("--dtype", choices=_DTYPES, help="with --shape: its activation dtype (default: float32)")
    how.add_argument("--fail-fast", action="store_true", help="stop behind the first item that fails")
    how.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=TIMEOUT,
        help=f"processor time that one item may take (default: {TIMEOUT:.0f}); silence by the clock, four times "
        "that (30 s with --distributed)",
    )
    ranks = parser.add_argument_group("a training step on several ranks")
    ranks.add_argument("--distributed", action="store_true", help="judge a training step in place of a layer")
    ranks.add_argument(
        "--step",
        metavar="SPEC",
        help="experts-in-parallel (default), fully-sharded or two-dimensions, which are this project's; plain, an "
        "honest one in plain PyTorch; module:callable or path/to/file.py:callable",
    )
    ranks.add_argument("--world", metavar="LIST", type=_worlds, help="numbers of ranks (default: 1,2,4; GPUs: as many)")
    where = parser.add_argument_group("where")
    options.add_device(where)
    options.add_processes(where, alone=f"one a core, {options.MOST} at most")
    where.add_argument("--require-gpu", action="store_true", help="refuse to run without a GPU")
    out = parser.add_argument_group("output")
    options.add_out(out, "gate.json and gate.html", "gate-report")
    options.add_record(out, "the result of this GPU")
    out.add_argument("--verbose", action="store_true", help="print every case and tensor")
    out.add_argument("--strict", action="store_true", help="a weak pass, a worse one or an uncovered case fails")
    out.add_argument(
        "--accept-baseline",
        metavar="DIR",
        type=Path,
        nargs="?",
        const=EVIDENCE,
        help="make this run's errors the baseline of its architecture",
    )


def run(arguments: argparse.Namespace) -> int:
    """The command; its exit code.

    Raises:
        UsageError: an argument does not fit this machine, these files or the others.
    """
    try:
        return _run(arguments)
    except (UsageError, LeftOutError, BrokenPipeError):
        raise
    except Exception as error:  # exit code 1 would blame the candidate
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
        print(f"mxref: error: the gate itself went wrong, not the candidate: {what}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    device = options.choose_device(arguments.device, arguments.require_gpu)
    if not arguments.distributed and (arguments.step is not None or arguments.world is not None):
        raise UsageError("--step and --world are for a step on several ranks: give --distributed too")
    for option in _OF_A_CLONE:
        if getattr(arguments, option):
            _part(option)
    if arguments.distributed:
        steps = _part("distributed")
        steps.check(arguments)
        _prepare(arguments.out)
        return _report(steps.judge(arguments, device), arguments, device)
    narrowed = not _own(arguments) or arguments.case or arguments.rerun or arguments.fail_fast
    if arguments.record is not None and (device.type != "cuda" or narrowed):
        raise UsageError("--record keeps a whole suite on the shipped kernels and a GPU; leave out what narrows it")
    if arguments.accept_baseline is not None and not _own(arguments):
        raise UsageError("--accept-baseline is for the shipped kernels on drawn cases; leave out what changes either")
    order = _order(arguments, device)
    console = options.terminal(120)
    try:
        if arguments.list:
            _print_list(list_items(order), console)
            return 0
        _prepare(arguments.out)
        result = _judge(order, arguments)
    except Refused as error:
        raise UsageError(str(error)) from None
    return _report(result, arguments, device)


def _part(option: str) -> ModuleType:
    """An option's module, which the wheel leaves out.

    Raises:
        LeftOutError: this is no clone.
    """
    return of_a_clone(_OF_A_CLONE[option], f"mxref gate --{option.replace('_', '-')}")


def _report(result: GateResult, arguments: argparse.Namespace, device: torch.device) -> int:
    console = Console(width=None if sys.stdout.isatty() else 120)
    accepted = None if result.interrupted else _baseline(result, arguments, device)
    print_result(result, console, verbose=arguments.verbose)
    try:
        data, page = write(result, arguments.out)
    except OSError as error:
        print(f"mxref: error: --out {arguments.out}: {error.strerror or error}; no report is kept", file=sys.stderr)
        return result.exit_code or 2
    options.note(console, "report", page)
    options.note(console, "data", data)
    if accepted is not None:
        options.note(console, "baseline", accepted)
    if arguments.record is not None and not result.interrupted:
        part = _part("distributed" if arguments.distributed else "record")
        options.note(console, "evidence", part.keep(result, arguments, device))
    return result.exit_code


def _prepare(folder: Path) -> None:
    """A writable folder without an earlier report."""
    for name in ("gate.json", "gate.html"):
        (options.writable_folder(folder) / name).unlink(missing_ok=True)


def _own(arguments: argparse.Namespace) -> bool:
    """Whether the shipped kernels are judged, as they declare themselves, on drawn cases."""
    a = arguments
    declared = a.points is not None or a.accumulation is not None or a.covers is not None
    ours = is_own(a.kernel) and not a.distributed
    return ours and not declared and a.weights is None and a.shape is None


def _baseline(result: GateResult, arguments: argparse.Namespace, device: torch.device) -> Path | None:
    """Hold the shipped kernels' errors against the accepted ones, or accept them; the written file."""
    if not (_own(arguments) and IS_CLONE):
        return None
    written: Path | None = _part("accept_baseline").baseline(result, arguments, device)
    return written


def _order(arguments: argparse.Namespace, device: torch.device) -> Order:
    a = arguments
    if a.weights is None and (a.layers is not None or a.experts is not None):
        raise UsageError("--layers and --experts choose from a checkpoint: give --weights too")
    if a.weights is not None and a.shape is not None:
        raise UsageError("--shape and --weights exclude each other: a checkpoint has its own shapes")
    if a.dtype is not None and a.shape is None:
        raise UsageError("--dtype is that of a problem of your own: give --shape too")
    points = None
    if a.points is not None:
        points = () if a.points == "contract" else tuple(a.points.replace(" ", "").split(","))
    try:
        projections = None if a.weights is None else Projections.chosen(a.weights, a.layers, a.experts)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from None
    return Order(
        a.kernel, device.type, "full" if a.full else "quick", a.seed, points, a.accumulation, a.covers,
        projections, a.shape, _DTYPES[a.dtype or "float32"], tuple(a.case or ()), tuple(a.rerun or ()),
    )  # fmt: skip


def _suite(order: Order) -> str:
    if order.projections is None:
        part = "" if IS_CLONE or not is_own(order.kernel) else "without the checks that only a clone has"
        return ", ".join(filter(None, [order.suite if order.shape is None else "", part, order.narrowed]))
    only = f", cases matching {' or '.join(order.patterns)}" if order.patterns else ""
    return order.projections.about + only


def _judge(order: Order, arguments: argparse.Namespace) -> GateResult:
    alone = 1 if order.narrowed else min(options.MOST, cores())
    with Meter() as meter:
        meter.show("loading the candidate")
        return judge_apart(
            order,
            suite=_suite(order),
            strict=arguments.strict,
            timeout=arguments.timeout,
            fail_fast=arguments.fail_fast,
            processes=options.processes_on(order.device, arguments.processes, alone),
            on_item=lambda entry, done, total: meter.show(f"{entry.checks[0]}: {entry.case}", done, total),
        )


def _print_list(entries: Sequence[ItemInfo], console: Console) -> None:
    table = new_table("id", "check", "case")
    for entry in entries:
        table.add_row(entry.id, ", ".join(entry.checks), entry.case)
    console.print(table)


def _shape(text: str) -> tuple[int, ...]:
    """An argparse type: E,K,N,M,k,r."""
    numbers = [int(part) for part in text.split(",") if part.strip().isdigit()]
    if len(numbers) != 6 or text.count(",") != 5:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; expected E,K,N,M,k,r such as 8,512,256,64,2,16")
    E, K, N, _tokens, k, _rank = numbers
    if not (E and K and N and k) or K % 32:
        raise argparse.ArgumentTypeError(f"{text!r}: E, N and k must be at least 1, and K a multiple of 32")
    return tuple(numbers)


def _worlds(text: str) -> tuple[int, ...]:
    """An argparse type: 1,2,4."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and 0 < int(part) <= 64 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of worlds; expected numbers of ranks such as 1,2,4")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _seconds(text: str) -> float:
    """An argparse type: seconds above 0."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; expected seconds above 0")
    return seconds
