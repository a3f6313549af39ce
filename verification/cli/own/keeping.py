"""What a benchmark leaves behind: its data in a folder, and a record where one is asked for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from mxref.verification.bench.pairs import digits
from mxref.verification.cli.options import note, writable_folder
from mxref.verification.clone import EVIDENCE
from mxref.verification.gate.result import GateResult
from mxref.verification.records.readme import update_readme
from mxref.verification.records.record import Entry, write
from mxref.verification.report.output import write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def keep(
    kind: str,
    found: Mapping[str, Any],
    arguments: argparse.Namespace,
    device: torch.device,
    page: Callable[[Entry], str] | None = None,
    chart: Callable[[Entry], Figure] | None = None,
    texts: Mapping[str, str] | None = None,
) -> dict[str, Path]:
    """Write what was found to `--out`, and as a record if `--record` asks for it: what it is, and where.

    What failed is no evidence. See `records.record.write` for `kind`, `page`, `chart` and `texts`.
    """
    out = writable_folder(arguments.out)
    kept = {"data": write_json(out / f"{kind}.json", found)}
    if chart is not None:
        kept["chart"] = out / f"{kind}.png"
        chart(dict(found)).savefig(kept["chart"], dpi=150)
    if arguments.record is not None and found["passed"]:
        kept["evidence"] = write(kind, found, device, arguments.record, page=page, chart=chart, texts=texts)
        if arguments.record.resolve() == EVIDENCE:
            kept["README"] = update_readme()
    return kept


def tell_red(results: Iterable[GateResult], console: Console) -> bool:
    """Whether the gate lets something not be timed; then its findings are printed."""
    wrong = [str(finding) for result in results for finding in result.findings if not finding.ok]
    if wrong:
        console.print("\n".join(wrong), style="red", markup=False)
        console.print("[bold red]The gate is red: nothing was timed.[/]")
    return bool(wrong)


def plain_rows(found: Iterable[Any]) -> list[dict[str, Any]]:
    """Instances of a dataclass as plain data, numbers without their noise."""
    return [{name: digits(x) if isinstance(x, float) else x for name, x in asdict(each).items()} for each in found]


def show(kept: Mapping[str, Path], console: Console) -> None:
    """A line for each file that was written."""
    for what, path in kept.items():
        note(console, what, path)
