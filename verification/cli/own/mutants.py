"""`mxref mutants`: plant bugs in the kernels' sources, one at a time, and see whether the gate's checks notice.

examples:
  mxref mutants                          120 mutants across all functions and kinds of mistake
  mxref mutants --all --jobs 8           the whole catalogue
  mxref mutants --all --by-hand --matrix what every check kills, and what only it kills
  mxref mutants --kind gates --list      print the mutants of one kind
  mxref mutants --all --gpu-only --minutes 8 --record     on a GPU; later: --rest in place of --all

exit codes: 0 every mutant is killed or known to change nothing, 1 not so, 2 wrong use
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from pathlib import Path

import torch

from mxref.verification.cli import UsageError, options
from mxref.verification.cli.progress import Meter
from mxref.verification.gate.plan import matches
from mxref.verification.records import record
from mxref.verification.records.sources import digests
from mxref.verification.report.output import write_json
from mxref.verification.studies.mutation.catalogue import catalogue, stratified
from mxref.verification.studies.mutation.locate import StaleMutantError
from mxref.verification.studies.mutation.mutant import Mutant
from mxref.verification.studies.mutation.questions import questions
from mxref.verification.studies.mutation.record import judged_before, left_open, payload, texts
from mxref.verification.studies.mutation.runner import Outcome, Setting
from mxref.verification.studies.mutation.session import TRIAL_SECONDS, FalseKillError, Session, judge
from mxref.verification.studies.mutation.sources import Source, read_sources
from mxref.verification.studies.mutation.tables import as_markdown, print_list, print_session

_SAMPLE = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    which = parser.add_argument_group("which mutants")
    size = which.add_mutually_exclusive_group()
    size.add_argument("--all", action="store_true", help="the whole catalogue")
    size.add_argument(
        "--sample", metavar="N", type=options.positive, default=_SAMPLE, help=f"so many (default: {_SAMPLE})"
    )
    size.add_argument("--rest", action="store_true", help="what the record leaves open; --record adds what is new")
    which.add_argument("--kind", metavar="PATTERN", action="append", default=[], help="only these kinds of mistake")
    which.add_argument("--name", metavar="PATTERN", action="append", default=[], help="only mutants that match")
    which.add_argument("--by-hand", action="store_true", help="none of the systematic ones")
    which.add_argument("--gpu-only", action="store_true", help="only those that the interpreter cannot show")
    options.add_seed(which, "of the sample and of every draw")
    which.add_argument("--list", action="store_true", help="print the mutants and stop")
    how = parser.add_argument_group("how")
    how.add_argument("--gate", action="store_true", help=argparse.SUPPRESS)
    how.add_argument("--matrix", action="store_true", help="ask every check about each mutant by hand; --record does")
    how.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the survivors: the sources' code, or none? (default: yes)",
    )
    options.add_jobs(how)
    how.add_argument("--minutes", metavar="N", type=float, default=math.inf, help="begin no mutant after so many")
    options.add_device(how)
    options.add_out(how, "mutants.json")
    how.add_argument("--record", action="store_true", help="keep the result of the whole catalogue as evidence")


def run(arguments: argparse.Namespace) -> int:
    """The subcommand; its exit code.

    Raises:
        UsageError: an argument does not fit this machine or the others.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # many processes share the machine
    torch.set_num_threads(1)
    device = options.choose_device(arguments.device)
    if arguments.gate:
        raise UsageError("--gate: mutants are always judged by the gate's own checks, on small cases; leave it out")
    if arguments.gpu_only and device.type == "cpu" and not arguments.list:
        raise UsageError("--gpu-only: torch sees no CUDA GPU on this machine")
    if arguments.record and not _is_whole(arguments, device):
        raise UsageError(
            "--record keeps --all or adds --rest: in the interpreter, or on a GPU with --gpu-only; leave out what else "
            "narrows it"
        )
    console = options.terminal()
    sources = read_sources()
    try:
        before = _before(device) if arguments.rest else None
        mutants = _selected(arguments, sources, device, before)
        if arguments.list:
            print_list(mutants, console)
            return 0
        folder = options.writable_folder(arguments.out) if arguments.out else None
        session = _judge(mutants, sources, device, arguments, before)
    except (StaleMutantError, FalseKillError) as error:
        print(f"mxref: error: {error}", file=sys.stderr)
        return 1
    print_session(session, sources, console)
    if folder is not None:
        options.note(console, "data", write_json(folder / "mutants.json", payload(session)))
    if arguments.record:
        options.note(console, "record", _record(session, sources, arguments, device, before))
    return session.exit_code


def _record(
    session: Session,
    sources: dict[str, Source],
    arguments: argparse.Namespace,
    device: torch.device,
    before: record.Entry | None,
) -> Path:
    """Keep a run; what --rest judged is added to what is kept."""
    if before is not None:
        session.judged += judged_before(before, catalogue(sources))
        session.matrix = session.matrix and before["matrix"]
    return record.write(
        "mutants",
        payload(session),
        device,
        command=f"mxref mutants --all {'--gpu-only ' if arguments.gpu_only else ''}--record",
        texts=texts((judged.mutant for judged in session.judged), sources),
        page=lambda entry: as_markdown(session, sources, entry),
    )


def _is_whole(arguments: argparse.Namespace, device: torch.device) -> bool:
    narrowed = (arguments.kind, arguments.name, arguments.by_hand, arguments.list)
    whole: bool = (arguments.all or arguments.rest) and not any(narrowed)
    return whole and arguments.gpu_only == (device.type == "cuda")


def _before(device: torch.device) -> record.Entry:
    """The record that --rest goes on from. A process of its own asks for the GPU's name: this one must not touch it."""
    ask = f"import torch; from {record.__name__} import *; print(record_path('mutants', torch.device('cuda')))"
    try:
        if device.type == "cpu":
            return record.read(record.record_path("mutants", device))
        told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
        return record.read(Path(told.stdout.strip()))
    except (OSError, ValueError) as error:
        raise UsageError(f"--rest: {error}") from None


def _selected(
    arguments: argparse.Namespace, sources: dict[str, Source], device: torch.device, before: record.Entry | None
) -> list[Mutant]:
    mutants = [
        mutant
        for mutant in catalogue(sources)
        if matches(mutant.category, arguments.kind)
        and matches(mutant.name, arguments.name)
        and (mutant.by_hand or not arguments.by_hand)
        and (mutant.gpu_only or not arguments.gpu_only)
        and (device.type == "cuda" or not mutant.gpu_only or (arguments.list and not arguments.rest))
    ]
    if before is not None:
        try:
            mutants = _left_open(before, mutants, sources)
        except ValueError as error:
            raise UsageError(f"--rest: {error}") from None
    if not mutants:
        raise UsageError("no mutant matches; --list prints those that do")
    if arguments.all or arguments.rest or arguments.list:
        return mutants
    return stratified(mutants, arguments.sample, arguments.seed)


def _left_open(entry: record.Entry, mutants: list[Mutant], sources: dict[str, Source]) -> list[Mutant]:
    now = digests(texts(mutants, sources))
    changed = sorted(
        name for name in now.keys() | entry["sources"].keys() if now.get(name) != entry["sources"].get(name)
    )
    if changed:
        raise ValueError(f"the record is older than {', '.join(changed)}; write it again: {entry['command']}")
    return left_open(entry, mutants)


def _judge(
    mutants: list[Mutant],
    sources: dict[str, Source],
    device: torch.device,
    arguments: argparse.Namespace,
    before: record.Entry | None,
) -> Session:
    """Judge behind a progress meter."""
    matrix = arguments.matrix or arguments.record
    setting = Setting(sources, device, matrix, arguments.jobs, TRIAL_SECONDS[device.type])
    killed = alive = 0
    with Meter(len(mutants)) as meter:

        def on_judged(outcome: Outcome) -> None:
            nonlocal killed, alive
            killed, alive = killed + outcome.killed, alive + (not outcome.killed)
            name = outcome.mutant.name if outcome.mutant is not None else ""
            meter.advance(f"{killed} killed, {alive} alive: {name}")

        return judge(
            mutants,
            questions(device, arguments.seed),
            setting,
            seconds=60 * arguments.minutes,
            compile_survivors=arguments.compile,
            alive_before=before["survived"] if before is not None else (),
            on_start=meter.show,
            on_judged=on_judged,
        )
