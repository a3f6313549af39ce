"""Shared by subcommands: options, terminal, folders."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryFile

import torch
from rich.console import Console

from mxref.verification.candidates.processes import cores
from mxref.verification.cli import UsageError
from mxref.verification.clone import EVIDENCE

MOST = 16
"""Processes that share the cases, unless more are wanted."""


def add_device(parser: argparse._ActionsContainer) -> None:
    """`--device`, for `choose_device`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")


def add_seed(parser: argparse._ActionsContainer, of: str = "of every draw") -> None:
    """`--seed`."""
    parser.add_argument("--seed", type=seed, default=0, help=f"{of} (default: 0)")


def add_jobs(parser: argparse._ActionsContainer, what: str = "processes at once") -> None:
    """`--jobs`."""
    parser.add_argument("--jobs", metavar="N", type=positive, default=cores(), help=what)


def add_processes(parser: argparse._ActionsContainer, alone: str) -> None:
    """`--processes`, for `processes_on`; `alone`: the default off a GPU."""
    parser.add_argument(
        "--processes",
        metavar="N",
        type=positive,
        help=f"that share the cases (default: {alone}; on a GPU as it and the cores allow, {MOST} at most)",
    )


def processes_on(device: torch.device, wanted: int | None, alone: int = 1) -> int:
    """How many processes share the cases: as wanted; on a GPU as it and the cores allow, at most MOST; else `alone`.

    One may need 6 GB for its context and the largest case; two cores are left to compile.

    Raises:
        UsageError: more than 64 are wanted.
    """
    if wanted is not None and wanted > 64:
        raise UsageError(f"--processes is {wanted}; expected 1 to 64")
    if wanted is not None or device.type == "cpu":
        return wanted or alone
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(1, min(MOST, cores() - 2, memory // 6_000_000_000))


def add_out(parser: argparse._ActionsContainer, files: str, default: str | None = None) -> None:
    """`--out`, the folder of a command's files."""
    folder, told = (Path(default), f" (default: {default})") if default else (None, "")
    parser.add_argument("--out", metavar="DIR", type=Path, default=folder, help=f"for {files}{told}")


def add_record(parser: argparse._ActionsContainer, what: str = "the result") -> None:
    """`--record`: the folder of evidence, None to keep nothing."""
    parser.add_argument(
        "--record", metavar="DIR", type=Path, nargs="?", const=EVIDENCE, help=f"keep {what} as evidence"
    )


def choose_device(wanted: str | None, require_gpu: bool = False) -> torch.device:
    """The device to judge on, "cpu" or "cuda"; on a CPU, kernels run in Triton's interpreter.

    Raises:
        UsageError: a GPU is asked for and there is none.
    """
    present = torch.cuda.is_available()
    if require_gpu and wanted == "cpu":
        raise UsageError("--require-gpu contradicts --device cpu")
    if (require_gpu or wanted == "cuda") and not present:
        raise UsageError("a GPU is asked for, but torch sees no CUDA GPU on this machine")
    device = torch.device(wanted or ("cuda" if present else "cpu"))
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    return device


def terminal(width: int = 140) -> Console:
    """The console of results; `width` for files and pipes."""
    return Console(width=None if sys.stdout.isatty() else width)


def note(console: Console, what: str, path: Path) -> None:
    """Say where something was written."""
    console.print(f"{what}: {path}", style="bright_black", soft_wrap=True, highlight=False)


def writable_folder(folder: Path, option: str = "--out") -> Path:
    """An option's folder, made if need be.

    Raises:
        UsageError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as probe:
            probe.write(b"mxref")
    except OSError as error:
        raise UsageError(f"{option} {folder}: {error.strerror or error}") from None
    return folder


def positive(text: str) -> int:
    """An argparse type: a whole number above 0."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def seed(text: str) -> int:
    """An argparse type: a whole number from 0 to 999999999."""
    if not re.fullmatch(r"\d{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; expected a whole number from 0 to 999999999")
    return int(text)
