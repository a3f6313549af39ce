"""`mxref inspect`: what a packed checkpoint holds.

Per expert projection: its shape, how its scale bytes are spread, and the share of blocks that are zero, saturated
(hold ±6, the largest code) or NaN (scale byte 255).

examples:
  mxref inspect model.safetensors          one file
  mxref inspect ./gpt-oss-20b              a directory of shards
  mxref inspect openai/gpt-oss-20b         a model of the local Hugging Face cache; nothing is downloaded

exit codes: 0 the checkpoint was read, whatever it holds; 2 wrong use or not readable
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.text import Text

from mxref.checkpoints import open_checkpoint, read_expert_weights
from mxref.checkpoints.statistics import BlockStatistics
from mxref.verification.cli import UsageError
from mxref.verification.cli.options import terminal
from mxref.verification.report.output import new_table

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("file", metavar="FILE", type=Path, help="a safetensors file, a directory, or a model id")


def run(arguments: argparse.Namespace) -> int:
    """The subcommand; its exit code.

    Raises:
        UsageError: the checkpoint cannot be read.
    """
    console = terminal()
    table = new_table("tensor", ">E × N × K", ">scale bytes", "", ">zero", ">saturated", ">NaN")
    for column in table.columns:
        column.overflow = "fold"
    blocks = nan = 0
    try:
        checkpoint = open_checkpoint(arguments.file)
        count, progress = len(checkpoint.projections), Console(stderr=True)
        stacks = read_expert_weights(checkpoint)
        for name, weights in track(stacks, "reading", total=count, console=progress, transient=True):
            found = BlockStatistics.of(name, weights)
            blocks, nan = blocks + found.blocks, nan + found.nan
            low, high = found.byte_range
            share = [_share(part, found.blocks) for part in (found.zero, found.saturated, found.nan)]
            table.add_row(
                Text(found.name),
                f"{found.E} × {found.N} × {found.K}",
                f"{low}–{high}",
                histogram(found),
                *share[:2],
                Text(share[2], style="red" if found.nan else "bright_black"),
            )
    except (OSError, ValueError) as error:
        raise UsageError(" ".join(str(error).split())) from None
    console.print(table)
    summary = f"{checkpoint.convention.name} names · {count} projections · {blocks:,} blocks of 32 · {nan:,} NaN"
    console.print(Text(summary, style="red" if nan else "bright_black"))
    return 0


def histogram(found: BlockStatistics) -> Text:
    """The range of scale bytes in use as bars, height by the square root of the count."""
    low, high = found.byte_range
    step = -(-(high - low + 1) // _WIDTH)
    bins = [sum(found.scale_bytes[byte : byte + step]) for byte in range(low, high + 1, step)]
    top = max(bins)
    bars = "".join(" " if not count else _BARS[round((count / top) ** 0.5 * (len(_BARS) - 1))] for count in bins)
    return Text(bars, style="blue")


def _share(part: int, whole: int) -> str:
    """Per cent; 0 and 100 only if exact."""
    if part in (0, whole):
        return "0 %" if not part else "100 %"
    return f"{min(max(100 * part / whole, 0.01), 99.99):.2f} %"
