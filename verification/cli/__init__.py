"""The `mxref` command. Exit codes: 0 the candidate passes, 1 it does not, 2 the command was used wrongly."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from mxref.verification.clone import IS_CLONE, LeftOutError, of_a_clone

__all__ = ["COMMANDS", "OF_A_CLONE", "UsageError", "main", "module_of"]

COMMANDS = {
    "gate": "judge an implementation against the golden model",
    "new-kernel": "write a file to start a kernel of your own from",
    "scoreboard": "judge implementations from elsewhere by the gate's checks",
    "mutants": "plant bugs in the kernels and see whether the checks notice",
    "calls": "judge a layer with planted bugs of how it is called: the checks must reject each",
    "steps": "judge training steps on several ranks with planted mistakes: the checks must name each",
    "honest": "judge implementations that are right: no check may reject one",
    "sanitize": "run the kernels under compute-sanitizer and Triton's ConSan (needs a GPU)",
    "warm": "compile a model's kernels in parallel, before its first training step",
    "inspect": "count the blocks of a packed checkpoint",
    "bench": "time the kernels beside the composite (needs a GPU)",
    "tune": "time every tiling beside the table's choice (needs a GPU)",
    "history": "speed over commits; fails on a slowdown",
    "evidence": "which records are kept, and which are stale",
}
"""Every subcommand and what it does; each is a module of this package, or of its folder `own`, with
`add_arguments(parser)` and `run(arguments)`, whose docstring is the command's help."""

OF_A_CLONE = frozenset(COMMANDS) - {"gate", "new-kernel", "warm", "inspect"}
"""Commands about this project's own sources, in the folder `own`, which the wheel leaves out."""


class UsageError(Exception):
    """Wrong use of the command line, exit code 2; the message is one line."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = _parse(argv)
        return int(arguments.run(arguments))
    except (UsageError, LeftOutError) as error:
        print(f"mxref: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mxref: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the output's reader has gone, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def module_of(command: str) -> ModuleType:
    """A command's module.

    Raises:
        LeftOutError: it is of a clone, and this is none.
    """
    name = command.replace("-", "_")
    if command in OF_A_CLONE:
        return of_a_clone(f"cli.own.{name}", f"mxref {command}")
    return import_module(f"{__name__}.{name}")


def _parse(argv: list[str]) -> argparse.Namespace:
    """Imports only the subcommand's module, once it is known whether kernels are interpreted."""
    parser = _Parser(prog="mxref", description="MXFP4 ScatterMoE-LoRA: judge an implementation by the golden model.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, about in COMMANDS.items():
        if argv[:1] != [name]:
            left_out = name in OF_A_CLONE and not IS_CLONE
            commands.add_parser(name, help=f"{about} [in a clone only]" if left_out else about)
            continue
        _choose_interpreter(argv)
        module = module_of(name)
        described, *shown = re.split(r"\n\n(?=examples?:|exit codes:)", str(module.__doc__), maxsplit=1)
        as_it_is = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(
            name, help=about, description=described, epilog="".join(shown), formatter_class=as_it_is
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser.parse_args(argv)


def _choose_interpreter(argv: list[str]) -> None:
    """Triton decides when kernels are imported: interpret them where the device is a CPU, compile them elsewhere."""
    # Looking for a GPU must not spoil it for forked processes. Threads that spin long while they wait take minutes for
    # seconds of work where other processes want the cores; those that never spin are slower on idle ones.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    from torch import cuda

    wanted = argv[argv.index("--device") + 1 :][:1] if "--device" in argv else []
    wanted += [word.partition("=")[2] for word in argv if word.startswith("--device=")]
    compiles = argv[0] == "warm"  # also where there is no GPU
    if wanted == ["cpu"] or not (compiles or cuda.is_available()):
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
