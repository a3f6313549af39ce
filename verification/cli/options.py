"""Options that several subcommands share."""

from __future__ import annotations

import argparse
import os
import re
from typing import TYPE_CHECKING

from mxref.verification.cli.usage import UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["choose_device", "positive", "seed"]


def choose_device(wanted: str | None, require_gpu: bool = False) -> torch.device:
    """The device to judge on, "cpu" or "cuda"; on a CPU, kernels run in Triton's interpreter.

    Raises:
        UsageError: a GPU is asked for and there is none.
    """
    import torch

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


def seed(text: str) -> int:
    """An argparse type: a whole number from 0 to 999999999."""
    if not re.fullmatch(r"\d{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; expected a whole number from 0 to 999999999")
    return int(text)


def positive(text: str) -> int:
    """An argparse type: a whole number above 0."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)
