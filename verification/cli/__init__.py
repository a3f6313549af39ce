"""The `mxref` command. Exit codes: 0 the candidate passes, 1 it does not, 2 the command was used wrongly."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from mxref.verification.cli import bench, gate, history, honest, inspect, mutants, scoreboard, tune
from mxref.verification.cli.usage import UsageError

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; its exit code."""
    parser = _Parser(prog="mxref", description="MXFP4 ScatterMoE-LoRA: judge an implementation by the golden model.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    gate.add_to(commands)
    scoreboard.add_to(commands)
    mutants.add_to(commands)
    honest.add_to(commands)
    inspect.add_to(commands)
    bench.add_to(commands)
    tune.add_to(commands)
    history.add_to(commands)
    try:
        arguments = parser.parse_args(argv)
        return int(arguments.run(arguments))
    except UsageError as error:
        print(f"mxref: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mxref: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
