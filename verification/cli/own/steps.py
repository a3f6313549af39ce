"""`mxref steps`: judge training steps on several ranks with planted mistakes, or honest ones.

Plant mistakes in honest training steps on several ranks (sums over ranks, shards, what travels, ranks that do not come
back), and judge each by `mxref gate --distributed`'s checks; or judge honest steps: partitions, orders, bucket sizes
and mesh shapes, sums in bf16 and means, each truly declared.

examples:
  mxref steps                      every mistake, by the check that must name it
  mxref steps --name "*saved*"     only those that match
  mxref steps --list               print them, with the check, the case and the ranks that show each
  mxref steps --honest --seeds 3   honest steps on 1, 2 and 4 ranks

exit codes: 0 every mistake is named by its check, or no honest step is rejected; 1 not so; 2 wrong use
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mxref.verification.cli import UsageError
from mxref.verification.cli.options import add_out, add_seed, note, positive, terminal, writable_folder
from mxref.verification.cli.progress import Meter
from mxref.verification.gate.plan import matches
from mxref.verification.report.output import new_table, write_json
from mxref.verification.studies.steps.catalogue import FAULTS
from mxref.verification.studies.steps.fault import Fault
from mxref.verification.studies.steps.honest import Runtime
from mxref.verification.studies.steps.run import Judged, judge_faults, judge_honest, payload
from mxref.verification.studies.steps.variants import VARIANTS

_WORLDS = (1, 2, 4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--name", metavar="PATTERN", action="append", default=[], help="only those that match")
    parser.add_argument("--honest", action="store_true", help="judge honest steps instead")
    add_seed(parser, "of every draw, the first of several")
    parser.add_argument("--seeds", metavar="N", type=positive, default=1, help="with --honest: so many (default: 1)")
    parser.add_argument("--list", action="store_true", help="print them and stop")
    add_out(parser, "steps.json")


def run(arguments: argparse.Namespace) -> int:
    """The command; its exit code.

    Raises:
        UsageError: nothing matches, or the arguments do not fit each other.
    """
    torch.set_num_threads(1)
    faults = [fault for fault in FAULTS if matches(fault.name, arguments.name)]
    variants = [variant for variant in VARIANTS if matches(variant.__name__, arguments.name)]
    if not (variants if arguments.honest else faults):
        raise UsageError("nothing matches; --list prints what there is")
    if arguments.seeds > 1 and not arguments.honest:
        raise UsageError("--seeds is for honest steps: give --honest too")
    console = terminal(160)
    if arguments.list:
        console.print(_variants(variants) if arguments.honest else _faults(faults), highlight=False)
        return 0
    if arguments.honest:
        return _honest(variants, range(arguments.seed, arguments.seed + arguments.seeds), console)
    with Meter(len(faults)) as meter:
        judged = judge_faults(faults, arguments.seed, lambda each: meter.advance(each.fault.name))
    _print(judged, console)
    found = payload(judged, arguments.seed)
    if arguments.out is not None:
        note(console, "data", write_json(writable_folder(arguments.out) / "steps.json", found))
    return int(not found["passed"])


def _honest(variants: Sequence[type[Runtime]], seeds: Sequence[int], console: Console) -> int:
    with Meter(len(variants) * len(_WORLDS)) as meter:
        rejected, count = judge_honest(variants, seeds, _WORLDS, meter.advance)
    for make, finding in rejected:
        console.print(f"[red]{make.__name__}[/]: {escape(str(finding))}", highlight=False)
    color = "red" if rejected else "green"
    console.print(f"[bold {color}]{len(rejected)} rejected[/] of {count:,} judgements of {len(variants)} honest steps")
    return int(bool(rejected))


def _faults(faults: Sequence[Fault]) -> Table:
    table = new_table("mistake", "what its author does", "check", "shown by")
    for fault in faults:
        shown = f"{fault.case}, {fault.ranks} ranks"
        table.add_row(escape(fault.name), escape(fault.mistake), fault.check, escape(shown))
    return table


def _variants(variants: Sequence[type[Runtime]]) -> Table:
    table = new_table("step", "what it does", "loss", "sums over ranks")
    for variant in variants:
        about = (variant.__doc__ or "").splitlines()[0]
        table.add_row(variant.__name__, escape(about), variant.mxref_loss, variant.mxref_reduction)
    return table


def _print(judged: Sequence[Judged], console: Console) -> None:
    """Survivors last, where a reader looks first."""
    table = new_table("mistake", "named by", "first finding", "also")
    for each in sorted(judged, key=lambda each: not each.killed):
        others = ", ".join(sorted({finding.check for finding in each.others}))
        check = each.fault.check if each.killed else f"[red]not by {each.fault.check}[/]"
        table.add_row(escape(each.fault.name), check, escape(str(each.named or each.fault.mistake)), others)
    console.print(table, highlight=False)
    alive = sum(not each.killed for each in judged)
    color = "red" if alive else "green"
    console.print(f"[bold {color}]{alive} survivors[/] of {len(judged)} planted mistakes", highlight=False)
