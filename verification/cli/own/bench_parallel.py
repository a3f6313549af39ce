"""`mxref bench --model NAME --parallel WAY`: whole models trained by several ranks, beside one."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from mxref.kernels.models.sizes import Model
from mxref.verification.bench.pairs import digits
from mxref.verification.cli import UsageError
from mxref.verification.cli.options import positive, writable_folder
from mxref.verification.cli.own.keeping import keep, show
from mxref.verification.gate.result import describe_device
from mxref.verification.records.kernel_sources import step_sources
from mxref.verification.report.output import write_json

if TYPE_CHECKING:
    from mxref.verification.models.together import Together

_PACKAGES = ("transformers", "peft", "accelerate")


def add_arguments(group: argparse._ActionsContainer) -> None:
    """The options of several ranks."""
    group.add_argument(
        "--parallel",
        choices=("fsdp", "experts"),
        action="append",
        help="train by several ranks, sharded by FSDP2 or with experts in parallel, beside one; may repeat",
    )
    group.add_argument("--world", metavar="N", type=positive, help="with --parallel: ranks, a GPU each (default: 2)")


def check(arguments: argparse.Namespace, device: torch.device) -> None:
    """Raise a UsageError if the options do not fit each other or the machine."""
    a = arguments
    if not a.parallel:
        if a.world is not None:
            raise UsageError("--world is for several ranks: give --parallel too")
        return
    if a.attention or a.largest_batch or a.profile or a.from_disk is not None:
        raise UsageError("--attention, --largest-batch, --profile and --from-disk are for one process: leave them out")
    if a.record is not None and a.side != "both":
        raise UsageError("--record keeps packed beside dense; leave out --side")
    if device.type == "cuda" and torch.cuda.device_count() < (a.world or 2):
        present = torch.cuda.device_count()
        raise UsageError(f"--world {a.world or 2}: torch sees {present} CUDA GPUs, and each rank needs one of its own")


def run(model: Model, arguments: argparse.Namespace, device: torch.device, console: Console) -> int:
    """Train one model in every way, show it, keep it; the exit code."""
    from mxref.verification.models.together import table, trained

    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # a card that is nearly full
    rows, path = list[dict[str, Any]](), writable_folder(arguments.out) / f"{model.name}-parallel.json"
    found: dict[str, Any] = {
        "passed": True,
        "started": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "model": model.name,
        "source": model.source,
        "of_layers": model.layers,
        "rank": arguments.rank or model.rank,
        "on": describe_device(device),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "rows": rows,
    }
    for question, ranks in _questions(model, arguments):
        row = trained(question, ranks, device.type, arguments.timeout)
        print(f"mxref: {model.name}: {row}", file=sys.stderr, flush=True)
        found["passed"] &= not row.status.startswith("failed")
        rows.append({name: digits(x) if isinstance(x, float) else x for name, x in asdict(row).items()})
        write_json(path, found)  # at once: what comes later may not come
    console.print(f"{model.name} on {found['on']}", style="bold", highlight=False)
    console.print(Markdown("\n".join(table(rows))))
    kept = keep(f"{model.name}-parallel", found, arguments, device, page=_page, texts=step_sources())
    show(kept, console)
    return int(not found["passed"])


def _questions(model: Model, arguments: argparse.Namespace) -> Iterator[tuple[Together, int]]:
    """What is trained, and by how many ranks. Dense experts are never divided here: beside those that are, FSDP2."""
    from mxref.kernels.models.sizes import Batch
    from mxref.verification.models.together import Together

    batches = [Batch.read(text) for text in arguments.batch or ("4x1024",)]
    sides: tuple[Any, ...] = ("packed", "dense") if arguments.side == "both" else (arguments.side,)
    ways = dict.fromkeys(arguments.parallel)
    order = [("one rank", side) for side in sides] + [(way, "packed") for way in ways if "packed" in sides]
    order += [("fsdp", "dense")] if "dense" in sides else []
    for batch in batches:
        for way, side in order:
            layers = min(arguments.layers or model.layers, model.layers)
            ranks = 1 if way == "one rank" else arguments.world or 2
            yield Together(model, side, way, layers, batch, arguments.steps, arguments.rank or model.rank), ranks


def _page(entry: dict[str, Any]) -> str:
    from mxref.verification.models.together import table

    v = entry["versions"]
    about = (
        f"Random weights; {entry['started'][:10]}, {entry['on']}, torch {v['torch']}, triton {v['triton']}. LoRA of "
        f"rank {entry['rank']} on experts, queries and values, AdamW, gradient checkpointing. Exchanges include "
        "waiting, and may run beside products."
    )
    return "\n".join([f"# {entry['model']} on several ranks", "", about, "", *table(entry["rows"])]) + "\n"
