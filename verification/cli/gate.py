"""`mxref gate`: judge an implementation, print the verdict, write the report."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mxref.checkpoints import ExpertTensor, list_expert_tensors
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.loading import declare, load
from mxref.verification.candidates.probe import runs_interpreted
from mxref.verification.candidates.shipped import golden, shipped, torch_composite
from mxref.verification.cases.scope import Scope, Suite
from mxref.verification.cli.options import choose_device, seed
from mxref.verification.cli.progress import Meter
from mxref.verification.cli.usage import UsageError
from mxref.verification.gate.plan import Item, plan, plan_checkpoint
from mxref.verification.gate.result import GateResult
from mxref.verification.gate.run import run_gate
from mxref.verification.records import record, ulp_baseline
from mxref.verification.records.gate_summary import gate_summary
from mxref.verification.records.record import EVIDENCE
from mxref.verification.report.page import write
from mxref.verification.report.terminal import print_result

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = (
    "Judge an implementation against the golden model: exhaustive decode, integer fixtures by bits, and derived error "
    "intervals on a grid of cases."
)

EPILOG = """\
examples:
  mxref gate                                    judge this project's kernels, quick suite
  mxref gate --kernel my_kernels.py:my_layer    judge your own differentiable callable
  mxref gate --weights ./gpt-oss-20b --layers 0 judge on a checkpoint's expert weights
  mxref gate --case 'integer*' --kernel golden  a few cases only; the golden model against itself

exit codes: 0 pass, within what is declared by --covers; 1 a failure, or something declined without having been
declared; 2 wrong use, or a fault that is not the candidate's
"""


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
    how.add_argument("--seed", type=seed, default=0, help="seed of every draw (default: 0)")
    how.add_argument("--list", action="store_true", help="print what would be asked, and stop")
    where = parser.add_argument_group("where")
    where.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    where.add_argument("--require-gpu", action="store_true", help="refuse to run without a GPU")
    out = parser.add_argument_group("output")
    out.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("gate-report"),
        help="for gate.json and gate.html (default: gate-report)",
    )
    out.add_argument(
        "--record", metavar="DIR", type=Path, nargs="?", const=EVIDENCE, help="keep the result as evidence of this GPU"
    )
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
    device = choose_device(arguments.device, arguments.require_gpu)
    _check_record(arguments, device)
    if arguments.accept_baseline is not None and not _own(arguments):
        raise UsageError("--accept-baseline is for the shipped kernels on drawn cases; leave out what changes either")
    candidate = _candidate(arguments, device)
    items, suite, narrowed = _items(arguments, candidate, device)
    console = Console(width=None if sys.stdout.isatty() else 120)
    if arguments.list:
        _print_list(items, console)
        return 0
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {arguments.out}: {error.strerror or error}") from None
    result = _judge(candidate, items, device, suite, narrowed, arguments)
    accepted = _baseline(result, device, arguments)
    data, page = write(result, arguments.out)
    print_result(result, console, verbose=arguments.verbose)
    console.print(f"report: {page}   data: {data}", style="bright_black", soft_wrap=True, highlight=False)
    if accepted is not None:
        console.print(f"baseline: {accepted}", style="bright_black", soft_wrap=True, highlight=False)
    if arguments.record is not None:
        kept = record.write("gate", gate_summary(result), device, arguments.record)
        console.print(f"evidence: {kept}", style="bright_black", soft_wrap=True, highlight=False)
    return result.exit_code


def _own(arguments: argparse.Namespace) -> bool:
    """Whether the shipped kernels are judged, as they declare themselves, on drawn cases."""
    a = arguments
    declared = a.points is not None or a.accumulation is not None or a.covers is not None
    return a.kernel == "shipped" and not declared and a.weights is None


def _baseline(result: GateResult, device: torch.device, arguments: argparse.Namespace) -> Path | None:
    """Hold the shipped kernels' errors against the accepted ones, or accept them if all is well; the written file."""
    if not _own(arguments):
        return None
    if arguments.accept_baseline is None:
        result.findings += ulp_baseline.baseline_findings(result.findings, device, result.seed)
        return None
    if any(not finding.ok for finding in result.findings):
        return None
    try:
        return ulp_baseline.accept(result.findings, device, result.seed, arguments.accept_baseline)
    except ValueError as error:
        raise UsageError(f"--accept-baseline: {error}") from None


def _check_record(arguments: argparse.Namespace, device: torch.device) -> None:
    """Evidence is a whole suite on this project's kernels, as they declare themselves, on a GPU."""
    a = arguments
    if a.record is not None and (device.type != "cuda" or not _own(a) or a.case):
        raise UsageError("--record keeps a whole suite on the shipped kernels and a GPU; leave out what narrows it")


def _candidate(arguments: argparse.Namespace, device: torch.device) -> Candidate:
    points = None
    if arguments.points is not None:
        points = [] if arguments.points == "contract" else arguments.points.replace(" ", "").split(",")
    own = {"shipped": lambda: shipped(device), "golden": golden, "composite": torch_composite}
    try:
        if arguments.kernel not in own:
            return load(arguments.kernel, points, arguments.accumulation, arguments.covers)
        return declare(own[arguments.kernel](), points, arguments.accumulation, arguments.covers)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _items(arguments: argparse.Namespace, candidate: Candidate, device: torch.device) -> tuple[list[Item], str, str]:
    """What will be judged, what to call it, and what of everything it is where it is not all."""
    suite: Suite = "full" if arguments.full else "quick"
    scope = Scope(suite, device.type, arguments.seed, runs_interpreted(candidate, device), candidate.covers)
    called, narrowed = str(suite), ""
    if arguments.weights is not None:
        tensors, called = _checkpoint(arguments.weights, arguments.layers)
        experts = _experts(arguments.experts)
        items = plan_checkpoint(arguments.weights, tensors, experts, scope)
        called += ", all experts" if experts is None else f", up to {experts} experts each"
        narrowed = called
    elif arguments.layers is not None or arguments.experts is not None:
        raise UsageError("--layers and --experts choose from a checkpoint: give --weights too")
    else:
        items = plan(scope, own=candidate.operators is not None)
    if arguments.case:
        items = [item for item in items if item.fits(arguments.case)]
        if not items:
            raise UsageError(f"--case {' '.join(arguments.case)} matches no case; --list prints them")
        narrowed = f"cases matching {' or '.join(arguments.case)}"
        called += f", {narrowed}"
    return items, called, narrowed


def _checkpoint(path: Path, layers: str | None) -> tuple[list[ExpertTensor], str]:
    """The projections of the chosen layers, and what to call them."""
    try:
        tensors = list_expert_tensors(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--weights: {error}") from None
    layer_of = {tensor.name: _layer(tensor.name) for tensor in tensors}
    present = sorted(set(layer_of.values()))
    wanted = present[:1] if layers is None else present if layers == "all" else _numbers(layers)
    missing = [layer for layer in wanted if layer not in present]
    if missing:
        raise UsageError(f"--layers {layers}: {path} has layers {_ranges(present)}; not {missing[0]}")
    chosen = [tensor for tensor in tensors if layer_of[tensor.name] in wanted]
    return chosen, f"checkpoint {path}, layer {_ranges(wanted)} of {len(present)}, {len(chosen)} projections"


def _layer(name: str) -> int:
    """The first number in a tensor's name; 0 where there is none."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(number.group(1)) if number else 0


def _numbers(text: str) -> list[int]:
    """0,3-5 as [0, 3, 4, 5]."""
    numbers: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if ends is None or int(ends.group(2) or ends.group(1)) < int(ends.group(1)):
            raise UsageError(f"--layers is {text!r}; expected numbers and ranges such as 0,3-5, or all")
        numbers += range(int(ends.group(1)), int(ends.group(2) or ends.group(1)) + 1)
    return sorted(set(numbers))


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 10] as 0–2, 10; two neighbours stay apart."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _experts(text: str | None) -> int | None:
    if text == "all":
        return None
    if text is not None and not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise UsageError(f"--experts is {text!r}; expected a positive number, or all")
    return int(text or 4)


def _judge(
    candidate: Candidate,
    items: Sequence[Item],
    device: torch.device,
    suite: str,
    narrowed: str,
    arguments: argparse.Namespace,
) -> GateResult:
    done = iter(range(len(items)))
    with Meter(len(items)) as meter:
        return run_gate(
            candidate, items, device, suite=suite, seed=arguments.seed, strict=arguments.strict, narrowed=narrowed,
            on_item=lambda item: meter.show(f"{item.checks[0].name}: {item.name}", next(done)),
        )  # fmt: skip


def _print_list(items: Sequence[Item], console: Console) -> None:
    table = Table("check", "case", box=None, header_style="bright_black")
    for item in items:
        table.add_row(", ".join(check.name for check in item.checks), item.name)
    console.print(table)
