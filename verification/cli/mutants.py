"""`mxref mutants`: plant bugs in the kernels' sources and see whether the guards notice."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mxref.verification.cli.options import choose_device, positive, seed
from mxref.verification.cli.usage import UsageError
from mxref.verification.gate.plan import matches
from mxref.verification.records.record import EVIDENCE

if TYPE_CHECKING:
    import torch

    from mxref.verification.studies.mutation.mutant import Mutant, Source
    from mxref.verification.studies.mutation.session import Session

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

_SAMPLE = 120

DESCRIPTION = "Plant bugs in the kernels' sources, one at a time, and see whether the gate's guards notice."

EPILOG = f"""\
examples:
  mxref mutants                          {_SAMPLE} mutants across all functions and kinds of mistake
  mxref mutants --all --jobs 8           the whole catalogue
  mxref mutants --all --matrix           what every layer kills, and what only it kills
  mxref mutants --all --by-hand --gate   those by hand, each by the quick gate itself
  mxref mutants --kind gates --list      print the mutants of one kind
  mxref mutants --all --gpu-only --minutes 8 --record     on a GPU; later: --rest in place of --all

exit codes: 0 every mutant is killed or known to change nothing, 1 not so, 2 wrong use
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    which = parser.add_argument_group("which mutants")
    size = which.add_mutually_exclusive_group()
    size.add_argument("--all", action="store_true", help="the whole catalogue")
    size.add_argument("--sample", metavar="N", type=positive, default=_SAMPLE, help=f"so many (default: {_SAMPLE})")
    size.add_argument("--rest", action="store_true", help="what the record leaves open; --record adds what is new")
    which.add_argument("--kind", metavar="PATTERN", action="append", default=[], help="only these kinds of mistake")
    which.add_argument("--name", metavar="PATTERN", action="append", default=[], help="only mutants that match")
    which.add_argument("--by-hand", action="store_true", help="none of the systematic ones")
    which.add_argument("--gpu-only", action="store_true", help="only those that the interpreter cannot show")
    which.add_argument("--seed", type=seed, default=0, help="of the sample and of every draw (default: 0)")
    which.add_argument("--list", action="store_true", help="print the mutants and stop")
    how = parser.add_argument_group("how")
    how.add_argument("--gate", action="store_true", help="judge by the quick gate's own steps, slower")
    how.add_argument("--matrix", action="store_true", help="ask every layer about every mutant, not only the first")
    how.add_argument("--compile", action="store_true", help="compile the survivors: the sources' code, or none?")
    how.add_argument("--jobs", metavar="N", type=positive, default=os.cpu_count() or 1, help="processes at once")
    how.add_argument("--minutes", metavar="N", type=float, default=math.inf, help="begin no mutant after so many")
    how.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    how.add_argument("--out", metavar="DIR", type=Path, help="write mutants.json there")
    how.add_argument("--record", action="store_true", help="keep the result of the whole catalogue as evidence")


def run(arguments: argparse.Namespace) -> int:
    """The subcommand; its exit code.

    Raises:
        UsageError: an argument does not fit this machine or the others.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # many processes share the machine
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for a GPU must not spoil it for forked processes
    device = choose_device(arguments.device)
    if arguments.gpu_only and device.type == "cpu" and not arguments.list:
        raise UsageError("--gpu-only: torch sees no CUDA GPU on this machine")
    if arguments.record and not _is_whole(arguments, device):
        raise UsageError(
            "--record keeps --all or adds --rest: in the interpreter, or on a GPU with --gpu-only; leave out what else "
            "narrows it"
        )
    from rich.console import Console

    from mxref.verification.studies.mutation import record
    from mxref.verification.studies.mutation.mutants import catalogue, read_sources
    from mxref.verification.studies.mutation.tables import print_list, print_session

    sources = read_sources()
    mutants = _selected(arguments, sources, device)
    console = Console(width=None if sys.stdout.isatty() else 140)
    if arguments.list:
        print_list(mutants, console)
        return 0
    if arguments.out is not None:
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {arguments.out}: {error.strerror or error}") from None
    session = _judge(mutants, sources, device, arguments)
    print_session(session, sources, console)
    if arguments.out is not None:
        path = arguments.out / "mutants.json"
        path.write_text(json.dumps(session.as_json(sources), indent=1), encoding="utf-8")
        console.print(f"data: {path}", style="bright_black", soft_wrap=True, highlight=False)
    if arguments.record:
        path = _record_of(device)
        if arguments.rest:
            before = json.loads(path.read_text(encoding="utf-8"))
            session.judged += record.judged_before(before, catalogue(sources))
            session.matrix = session.matrix and before["matrix"]
        record.write(session, sources, path)
        console.print(f"record: {path}", style="bright_black", soft_wrap=True, highlight=False)
    return session.exit_code


def _is_whole(arguments: argparse.Namespace, device: torch.device) -> bool:
    narrowed = (arguments.kind, arguments.name, arguments.by_hand, arguments.list, arguments.gate)
    whole: bool = (arguments.all or arguments.rest) and not any(narrowed)
    return whole and arguments.gpu_only == (device.type == "cuda")


def _record_of(device: torch.device) -> Path:
    """The record's path. A process of its own asks for the GPU's name: this one must not touch the GPU."""
    from mxref.verification.records import record as records
    from mxref.verification.studies.mutation import record

    if device.type == "cpu":
        return record.RECORD
    ask = f"import torch; from {records.__name__} import *; print(folder_name(torch.device('cuda')))"
    told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return EVIDENCE / told.stdout.strip() / record.RECORD.name


def _selected(arguments: argparse.Namespace, sources: dict[str, Source], device: torch.device) -> list[Mutant]:
    from mxref.verification.studies.mutation import record
    from mxref.verification.studies.mutation.mutants import catalogue, stratified

    mutants = [
        mutant
        for mutant in catalogue(sources)
        if matches(mutant.category, arguments.kind)
        and matches(mutant.name, arguments.name)
        and (mutant.by_hand or not arguments.by_hand)
        and (mutant.gpu_only or not arguments.gpu_only)
        and (arguments.list or device.type == "cuda" or not mutant.gpu_only)
    ]
    if arguments.rest:
        try:
            entry = json.loads(_record_of(device).read_text(encoding="utf-8"))
            mutants = record.unexplained(entry, mutants, sources)
        except (OSError, ValueError) as error:
            raise UsageError(f"--rest: {error}") from None
    if not mutants:
        raise UsageError("no mutant matches; --list prints those that do")
    return (
        mutants
        if arguments.all or arguments.rest or arguments.list
        else stratified(mutants, arguments.sample, arguments.seed)
    )


def _judge(
    mutants: list[Mutant], sources: dict[str, Source], device: torch.device, arguments: argparse.Namespace
) -> Session:
    """Run behind a progress bar on stderr."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    from mxref.verification.cases.draw import draw
    from mxref.verification.cases.small import drawn_cases
    from mxref.verification.studies.mutation.layers import layers
    from mxref.verification.studies.mutation.runner import Outcome
    from mxref.verification.studies.mutation.session import judge

    torch.set_num_threads(1)
    columns = (
        SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[tally]}"),
        TextColumn("{task.description}", style="bright_black"),
    )  # fmt: skip
    console = Console(stderr=True)
    killed = survived = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(mutants), tally="")

        def on_start(what: str) -> None:
            progress.update(task, description=what)

        def on_judged(outcome: Outcome) -> None:
            nonlocal killed, survived
            killed, survived = killed + outcome.killed, survived + (not outcome.killed)
            name = outcome.mutant.name if outcome.mutant is not None else ""
            progress.update(task, advance=1, description=name, tally=f"{killed} killed, {survived} alive")

        return judge(
            mutants, sources, layers(device, arguments.seed),
            [draw(case, seed=arguments.seed) for case in drawn_cases(device.type)], device,
            matrix=arguments.matrix, jobs=arguments.jobs, seconds=60 * arguments.minutes,
            compile_survivors=arguments.compile, on_start=on_start, on_judged=on_judged,
        )  # fmt: skip
