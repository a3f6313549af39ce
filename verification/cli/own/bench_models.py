"""`mxref bench --model`: whole models trained on packed and on dense experts, each side in a process of its own."""

from __future__ import annotations

import argparse
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from mxref.kernels.models.sizes import MODELS, Model
from mxref.verification.cli import UsageError
from mxref.verification.cli.options import choose_device, positive, terminal, writable_folder
from mxref.verification.cli.own import bench_parallel
from mxref.verification.cli.own.keeping import keep, show
from mxref.verification.gate.result import describe_device
from mxref.verification.models.report import as_page, figures
from mxref.verification.records.freshness import survey
from mxref.verification.records.record import KINDS, folder_name
from mxref.verification.report.output import write_json

if TYPE_CHECKING:
    from mxref.verification.models.side import Task

_NEEDED = ("transformers", "peft", "accelerate")
_STEPS, _SILENCE = 5, 300
_OF_A_MODEL = (
    "batch", "side", "attention", "steps", "rank", "layers", "largest_batch", "profile", "from_disk", "parallel",
    "world", "device", "timeout",
)  # fmt: skip
_OF_A_LAYER = ("quick", "rows", "host", "sustained", "large", "shape", "no_peers", "samples")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of whole models."""
    group = parser.add_argument_group("whole models")
    group.add_argument(
        "--model", metavar="NAME", action="append", help=f"train this model whole: {', '.join(MODELS)}; may repeat"
    )
    group.add_argument(
        "--batch", metavar="BxT", action="append", help="sequences x tokens; may repeat (default: 1x512, 4x1024)"
    )
    group.add_argument("--side", choices=("packed", "dense", "both"), help="how experts are held (default: both)")
    group.add_argument(
        "--attention", metavar="NAME", action="append", help="eager (default), flex_attention, …; may repeat"
    )
    group.add_argument("--steps", metavar="N", type=positive, help=f"measured steps a batch (default: {_STEPS})")
    group.add_argument(
        "--rank", metavar="R", type=positive, help="of the adapters (default: 16; 8 for gpt-oss-120b, to fit 80 GB)"
    )
    group.add_argument("--layers", metavar="N", type=positive, help="only so many layers (default: all, or what fits)")
    group.add_argument("--largest-batch", action="store_true", help="double the last batch until it does not fit")
    group.add_argument("--profile", action="store_true", help="where a step's time goes; the MoE block and its limit")
    group.add_argument(
        "--from-disk", metavar="DIR", type=Path, help="write the packed model there as a checkpoint, load it, train it"
    )
    bench_parallel.add_arguments(group)
    group.add_argument("--device", choices=("cuda", "cpu"), help="of whole models (default: cuda)")
    group.add_argument(
        "--timeout", metavar="SECONDS", type=positive, help=f"that a side may stay silent (default: {_SILENCE})"
    )


def check(arguments: argparse.Namespace) -> None:
    """Whether the options fit a whole model, if one is asked for, or a layer.

    Raises:
        UsageError: one does not.
    """
    others = _OF_A_LAYER if arguments.model else _OF_A_MODEL
    for name in others:
        if getattr(arguments, name):
            whose = "a layer: leave --model out" if arguments.model else "whole models: give --model NAME too"
            raise UsageError(f"--{name.replace('_', '-')} is for {whose}")


def run(arguments: argparse.Namespace) -> int:
    """Train every model that was asked for; the exit code.

    Raises:
        UsageError: an argument does not fit this machine or the others.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise UsageError(f"--model needs {', '.join(missing)}: pip install {' '.join(missing)}")
    arguments.device, arguments.side = arguments.device or "cuda", arguments.side or "both"
    arguments.steps, arguments.timeout = arguments.steps or _STEPS, arguments.timeout or _SILENCE
    models = _models(arguments.model)
    device = choose_device(arguments.device, require_gpu=arguments.device == "cuda")
    if arguments.record is not None and (device.type == "cpu" or any(m.name not in KINDS for m in models)):
        raise UsageError("--record keeps what a GPU saw of a published model; leave it out")
    if arguments.record is not None and arguments.layers is not None:
        raise UsageError("--record keeps whole models, or as many layers as fit; leave --layers out")
    bench_parallel.check(arguments, device)
    tasks = [_tasks(model, arguments) for model in models]
    console = terminal(160)
    if wrong := _found_wrong(device, arguments.timeout):
        console.print("\n".join(wrong), style="red", markup=False)
        console.print("[bold red]The gate is red: nothing was timed.[/]")
        return 1
    if arguments.parallel:
        return max([bench_parallel.run(model, arguments, device, console) for model in models])
    return max([_one(*each, arguments, device, console) for each in zip(models, tasks, strict=True)])


def _found_wrong(device: torch.device, seconds: float) -> list[str]:
    """What the gate finds, unless its record says that these kernels, with these versions, have passed on this card."""
    from mxref.verification.models.run import run_gate_apart

    for state in survey():
        if (state.kind, state.folder) == ("gate", folder_name(device)) and state.fresh and not state.moved:
            return [] if state.entry["passed"] else state.entry["failures"]
    print("mxref: the gate comes first", file=sys.stderr, flush=True)
    return run_gate_apart(device.type, seconds)


def _models(names: list[str]) -> list[Model]:
    asked = [name for text in names for name in text.split(",")]
    if unknown := [name for name in asked if name not in MODELS]:
        raise UsageError(f"--model {unknown[0]} is unknown; choose from {', '.join(MODELS)}")
    return [MODELS[name] for name in dict.fromkeys(asked)]


def _one(model: Model, tasks: list[Task], arguments: argparse.Namespace, device: torch.device, console: Console) -> int:
    """Train one model, show it, keep it, also when it is interrupted; the exit code."""
    from mxref.verification.models.run import ModelRun, run_model

    found = ModelRun(model.name, model.source, model.layers, tasks[0].rank, describe_device(device))
    data = writable_folder(arguments.out) / f"{model.name}.json"

    def news(text: str) -> None:
        print(f"mxref: {model.name}: {text}", file=sys.stderr, flush=True)
        write_json(data, found.as_json())  # at once: what comes later may not come

    try:
        run_model(found, tasks, arguments.timeout, news)
    finally:
        seen = found.as_json()
        console.print(f"{model.name} on {found.device}", style="bold", highlight=False)
        console.print(Markdown("\n".join(figures(seen))))
        show(keep(model.name, seen, arguments, device, page=as_page), console)
    return found.exit_code


def _tasks(model: Model, arguments: argparse.Namespace) -> list[Task]:
    from mxref.kernels.models.sizes import Batch
    from mxref.verification.models.side import Task

    try:
        batches = tuple(Batch.read(text) for text in arguments.batch or ("1x512", "4x1024"))
    except ValueError as error:
        raise UsageError(f"--batch {error}") from None
    sides: tuple[Any, ...] = ("packed", "dense") if arguments.side == "both" else (arguments.side,)
    attentions, rank = list(dict.fromkeys(arguments.attention or ["eager"])), arguments.rank or model.rank
    trained = model if arguments.layers is None else model.shortened(arguments.layers)
    tasks = [
        Task(
            trained, side, batches, attention, arguments.device, arguments.steps, rank, arguments.largest_batch,
            arguments.profile,
        )
        for attention in attentions
        for side in sides
    ]  # fmt: skip
    if arguments.from_disk is not None:
        place = _place(trained, arguments.from_disk)
        tasks.append(
            Task(trained, "packed", batches, attentions[0], arguments.device, arguments.steps, rank, folder=place)
        )
    return tasks


def _place(model: Model, folder: Path) -> str:
    """Where the checkpoint of a model goes.

    Raises:
        UsageError: it does not fit there, or no card holds the model that would be written.
    """
    from mxref.verification.models.build import empty_model, needs

    if model.as_many_layers:
        raise UsageError(f"--from-disk writes a whole model, and no card holds {model.name}: give --layers too")
    needed = needs(empty_model(model.config()), model, rank=0, packed=True).total
    place = writable_folder(folder, "--from-disk") / model.name
    if (free := shutil.disk_usage(folder).free) < needed:
        told = f"{needed / 2**30:.1f} GiB, and there are {free / 2**30:.1f}"
        raise UsageError(f"--from-disk {folder}: a checkpoint of {model.name} takes {told}")
    return str(place)
