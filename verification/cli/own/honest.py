"""`mxref honest`: judge implementations that are right, each under its true declaration; no check may reject one.

examples:
  mxref honest                               every implementation on ten kinds of data, 5 draws of each, and those that
                                             can be called on cases that cover the domain
  mxref honest --data domain --seeds 3       the domain alone
  mxref honest --data cancelling --seeds 50  one kind of data, many draws
  mxref honest --device cuda                 the shipped kernels under each reachable configuration

exit codes: 0 no check rejects an honest implementation, 1 one does, 2 wrong use
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from mxref.verification.cases.case import Case
from mxref.verification.cases.draw import draw
from mxref.verification.cli import UsageError, options
from mxref.verification.cli.progress import Meter
from mxref.verification.gate.plan import matches
from mxref.verification.report.output import new_table, write_json
from mxref.verification.studies.honest.implementations import Honest, asked, cases_of, emulated, judge, on_gpu


@dataclass(frozen=True)
class Judgement:
    """One implementation on one draw; `complaint` is the first failure, "" for none."""

    implementation: str
    data: str
    seed: int
    complaint: str


_Draw = tuple[Case, int]
"""A case, and the seed that it is drawn with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--name", metavar="PATTERN", action="append", default=[], help="only these implementations")
    parser.add_argument("--data", metavar="PATTERN", action="append", default=[], help="only these kinds of data")
    parser.add_argument(
        "--seeds", metavar="N", type=options.positive, default=5, help="draws of each kind (default: 5)"
    )
    options.add_jobs(parser, "processes; on a GPU at most 16, and what it holds")
    options.add_device(parser)
    options.add_out(parser, "honest.json")


def run(arguments: argparse.Namespace) -> int:
    """The command; its exit code.

    Raises:
        UsageError: an argument does not fit this machine or the others.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # many processes share the machine
    device = options.choose_device(arguments.device)

    start = time.monotonic()
    chosen = [h for h in _implementations(device) if matches(h.name, arguments.name)]
    draws = [
        (case, seed)
        for seed in range(arguments.seeds)
        for dtype in dict.fromkeys(honest.dtype for honest in chosen)
        for case in cases_of(dtype, seed)
        if matches(_kind(case), arguments.data)
    ]
    total = sum(len(asked(chosen, case, seed)) for case, seed in draws)
    if not total:
        raise UsageError("no implementation or no kind of data matches; see `mxref honest --help`")
    jobs = min(arguments.jobs, options.processes_on(device, None, arguments.jobs))
    judged = _judge(draws, total, device, arguments.name, jobs)
    console = options.terminal()
    _print(judged, time.monotonic() - start, console)
    if arguments.out is not None:
        data = _as_json(judged, device, arguments.seeds)
        options.note(console, "data", write_json(options.writable_folder(arguments.out) / "honest.json", data))
    return int(any(judgement.complaint for judgement in judged))


def _kind(case: Case) -> str:
    """What a case counts as: its kind of data, or one of the domain's."""
    return "domain" if case.covers else case.name


@cache
def _implementations(device: torch.device) -> Sequence[Honest]:
    return emulated() if device.type == "cpu" else on_gpu(device)


def _judge(draws: list[_Draw], total: int, device: torch.device, names: list[str], jobs: int) -> list[Judgement]:
    """All draws, in several processes."""
    judged: list[Judgement] = []
    with Meter(total) as meter:
        for each in _mapped(partial(_judge_draw, device=device, names=names), draws, jobs):
            judged += each
            failures = sum(bool(judgement.complaint) for judgement in judged)
            meter.advance(f"{failures} failures", len(each))
    return judged


def _mapped(
    function: Callable[[_Draw], list[Judgement]], draws: Iterable[_Draw], jobs: int
) -> Iterator[list[Judgement]]:
    if jobs == 1:
        yield from map(function, draws)
        return
    with get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(function, draws)


def _judge_draw(each: _Draw, device: torch.device, names: list[str]) -> list[Judgement]:
    torch.set_num_threads(1)
    case, seed = each
    chosen = asked([h for h in _implementations(device) if matches(h.name, names)], case, seed)
    judged = []
    for honest, findings in judge(chosen, draw(case, device, seed)) if chosen else ():
        complaint = next((str(finding) for finding in findings if not finding.ok), "")
        judged.append(Judgement(honest.name, _kind(case), seed, complaint))
    return judged


def _print(judged: Sequence[Judgement], seconds: float, console: Console) -> None:
    """Failures of each implementation by kind of data, every complaint, and the counts last."""
    made = Counter((judgement.implementation, judgement.data) for judgement in judged)
    failed = Counter((judgement.implementation, judgement.data) for judgement in judged if judgement.complaint)
    kinds = list(dict.fromkeys(judgement.data for judgement in judged))
    title = "failures / judgements of honest implementations"
    table = new_table("implementation", *(f">{kind}" for kind in kinds), title=title)
    for name in sorted({judgement.implementation for judgement in judged}):
        cells = [f"{failed[name, kind]}/{made[name, kind]}" if made[name, kind] else "–" for kind in kinds]
        table.add_row(escape(name), *cells)
    console.print(table)
    for judgement in judged:
        if judgement.complaint:
            text = f"{judgement.implementation}, seed {judgement.seed}: {judgement.complaint}"
            console.print(text, markup=False, style="red", soft_wrap=True)
    count = sum(failed.values())
    names = len({judgement.implementation for judgement in judged})
    console.print(
        f"[bold {'red' if count else 'green'}]{count} failures[/] in {len(judged)} judgements of {names} honest "
        f"implementations; {seconds:.0f} s",
        highlight=False,
    )


def _as_json(judged: Sequence[Judgement], device: torch.device, seeds: int) -> dict[str, Any]:
    """Plain data: judgements by implementation and kind of data, and every failure."""
    table: dict[str, Counter[str]] = {}
    for judgement in sorted(judged, key=lambda judgement: (judgement.implementation, judgement.data)):
        table.setdefault(judgement.implementation, Counter())[judgement.data] += 1
    return {
        "schema": "mxref.honest/1",
        "device": device.type,
        "seeds": seeds,
        "judgements": len(judged),
        "by implementation and data": table,
        "failures": [vars(judgement) for judgement in judged if judgement.complaint],
    }
