"""`mxref warm`: compile what a model's first training step would compile, in parallel, before it.

A first step compiles its kernels in threads before it starts, which takes seconds. This command runs the steps of the
model's packed experts without memory, compiles every kernel that they would start in several processes, and leaves all
of them in Triton's cache (TRITON_CACHE_DIR). A step finds them there if it runs under the same versions of Triton and
of this package, the same environment variables of Triton, and adapters in fp32, as PEFT and load_packed_model make
them. Not known here, and compiled when they are first met: kernels of other libraries, adapters of another rank or
dtype, several adapters at once, weights with a scale byte above 128, experts divided among GPUs.

examples:
  mxref warm ./gpt-oss-20b                         a directory with config.json; nothing else of it is read
  mxref warm openai/gpt-oss-20b --rank 32          a model of the local Hugging Face cache; nothing is downloaded
  mxref warm gpt-oss-120b --tokens 4x1024          published sizes, and steps of 4 sequences of 1024 tokens alone
  mxref warm ./gpt-oss-20b --architecture sm_90    on a machine without a GPU that shares its cache with one

exit codes: 0 all is compiled; 2 wrong use, or a model that is not covered
"""

from __future__ import annotations

import argparse
import re
import time
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton

from mxref.kernels.models.sizes import MODELS, Batch
from mxref.verification.cli import UsageError
from mxref.verification.cli.options import add_jobs, positive, terminal, writable_folder
from mxref.verification.cli.progress import Meter

if TYPE_CHECKING:
    from mxref.kernels.models.warming import Experts

_NEEDED = ("transformers", "accelerate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    named = ", ".join(MODELS)
    parser.add_argument("model", metavar="MODEL", help=f"a directory, a model id, or published sizes: {named}")
    parser.add_argument(
        "--tokens", metavar="BxT", type=_tokens, action="append", default=[],
        help="sequences x tokens of a step on one GPU; may repeat (default: all that any number needs)",
    )  # fmt: skip
    parser.add_argument("--rank", metavar="R", type=positive, default=16, help="of the adapters (default: 16)")
    parser.add_argument(
        "--architecture",
        metavar="sm_NN",
        type=_architecture,
        help="a GPU by its compute capability (default: this one)",
    )
    parser.add_argument("--sharded", action="store_true", help="the model is to be sharded over GPUs, as by FSDP2")
    add_jobs(parser, "processes that compile")


def run(arguments: argparse.Namespace) -> int:
    """The subcommand; its exit code.

    Raises:
        UsageError: there is no GPU and none was named, the compiler does not know the named one, the model cannot be
            read or is not covered, or Triton's cache cannot be written.
    """
    begin = time.monotonic()
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise UsageError(f"mxref warm needs {', '.join(missing)}: pip install {' '.join(missing)}")
    architecture = arguments.architecture or _this_gpu()
    from mxref.kernels.compiled.units import compile_units
    from mxref.kernels.models.warming import step_units

    experts = _experts(arguments.model, arguments.rank, arguments.sharded)
    units = step_units(experts, architecture, arguments.tokens)
    cache = writable_folder(Path(triton.knobs.cache.dir), "TRITON_CACHE_DIR")
    with Meter(len(units)) as meter:
        new = 0
        try:
            for unit, compiled in compile_units(units, arguments.jobs):
                new += compiled
                meter.advance(f"{unit.kernel}, {unit.label}")
        except BrokenProcessPool:  # LLVM ends a process that asks for what it does not know
            what = f"a process that compiled for {architecture} has died"
            raise UsageError(f"{what}: the compiler knows no such GPU, or memory ran out (--jobs)") from None
    console = terminal()
    for kind in experts:
        what = f"{kind.E} experts, {kind.k} a token, {kind.H} → {2 * kind.I}, {kind.I} → {kind.H}"
        rest = f"adapters of rank {kind.rank} in {_plain(kind.lora_dtype)}"
        console.print(f"{what}, {_plain(kind.dtype)}{', biases' if kind.biased else ''}, {rest}", highlight=False)
    seconds = f"{time.monotonic() - begin:.1f} s"
    told = f"{len(units)} kernels for {architecture}: {new} compiled, {len(units) - new} were there · {seconds}"
    console.print(f"{told}, {arguments.jobs} processes at once", highlight=False)
    console.print(f"cache: {cache}", style="bright_black", soft_wrap=True, highlight=False)
    return 0


def _experts(model: str, rank: int, sharded: bool) -> list[Experts]:
    from mxref.kernels.models.adapters import check_adapter
    from mxref.kernels.models.loading import empty_model, read_config
    from mxref.kernels.models.warming import experts_of

    try:
        check_adapter(rank)
        config: Any = MODELS[model].config() if model in MODELS else read_config(model)
        return experts_of(empty_model(config), rank, sharded=sharded)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(" ".join(str(error).split())) from None


def _this_gpu() -> str:
    """By Triton's driver, whose first use also compiles its launcher."""
    if not torch.cuda.is_available():
        raise UsageError("torch sees no CUDA GPU on this machine; name one, such as --architecture sm_90")
    return _architecture(f"sm_{triton.runtime.driver.active.get_current_target().arch}")


def _architecture(text: str) -> str:
    if not re.fullmatch(r"sm_([89]\d|1\d\d)", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no GPU of compute capability 8.0 or later, such as sm_90")
    return text


def _tokens(text: str) -> int:
    """An argparse type: a batch such as 4x1024."""
    try:
        return Batch.read(text).size
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
