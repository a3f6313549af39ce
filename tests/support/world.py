"""A world of processes on the CPU (gloo): bounded in time, and whichever rank fails, dies or hangs is named."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

TIMEOUT, COLLECTIVE, LEAVE = 600.0, 300.0, 60.0
"""Seconds, so many that they pass only where something hangs: that a world gets; after which a collective gives up;
that ranks get after one of them has failed, or all have answered (gloo has hung in its farewell, once)."""

_PRELOADED = [
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "transformers.trainer",
    "transformers.models.gpt_oss.modeling_gpt_oss",
    "mxref.kernels.models.peft",
]
"""Imported once, by the server that every rank is forked from."""


@dataclass(frozen=True)
class Outcome:
    """What became of one rank: its answer, or its error and traceback, or, with neither, how it ended."""

    rank: int
    value: Any = None
    error: str = ""
    exitcode: int | None = None

    @property
    def failed(self) -> bool:
        return bool(self.error) or self.exitcode != 0

    def __str__(self) -> str:
        ended = "was still running and was ended" if self.exitcode is None else f"ended with exit code {self.exitcode}"
        return f"rank {self.rank} {ended}\n{self.error}"


def run(work: Callable[..., Any], size: int, *arguments: Any, **options: Any) -> list[Any]:
    """Every rank's answer.

    Raises:
        AssertionError: a rank failed; the message names it.
    """
    outcomes = outcomes_of(work, size, *arguments, **options)
    if failed := [outcome for outcome in outcomes if outcome.failed]:
        raise AssertionError("\n".join(map(str, failed)))
    return [outcome.value for outcome in outcomes]


def outcomes_of(
    work: Callable[..., Any], size: int, *arguments: Any, timeout: float = TIMEOUT, leave: float = LEAVE
) -> list[Outcome]:
    """What became of every rank of a world of `size` processes that each ran `work(*arguments)`.

    Args:
        work: a function of a module that can be imported.
        size: of the world.
        arguments: can be pickled.
        timeout: seconds until ranks that still run are killed.
        leave: seconds until they are, once a rank has failed or all have answered.
    """
    context = _context()
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            context.Process(target=_rank, args=(directory, rank, size, work, arguments), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        _wait(processes, [Path(directory) / str(rank) for rank in range(size)], timeout, leave)
        return [_outcome(Path(directory) / str(rank), rank, process) for rank, process in enumerate(processes)]


def _context() -> Any:
    """Where processes come from: a server whose kernels are interpreted, also where there is a GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    forkserver.ensure_running()
    if before is None:
        del os.environ["TRITON_INTERPRET"]
    return context


def _wait(processes: list[BaseProcess], answers: list[Path], timeout: float, leave: float) -> None:
    deadline, hurried = time.monotonic() + timeout, False
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if not hurried and (any(p.exitcode for p in processes) or all(path.exists() for path in answers)):
            deadline, hurried = min(deadline, time.monotonic() + leave), True
        time.sleep(0.02)
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
            process.ended = True  # type: ignore[attr-defined]


def _outcome(answer: Path, rank: int, process: BaseProcess) -> Outcome:
    value, error = pickle.loads(answer.read_bytes()) if answer.exists() else (None, "")
    answered = answer.exists() and not error
    return Outcome(rank, value, error, 0 if answered else None if hasattr(process, "ended") else process.exitcode)


def _rank(directory: str, rank: int, size: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    distributed.init_process_group(
        "gloo", f"file://{directory}/meeting", rank=rank, world_size=size, timeout=timedelta(seconds=COLLECTIVE)
    )
    value, error = None, ""
    try:
        value = work(*arguments)
    except BaseException:
        error = traceback.format_exc()
    part = Path(directory) / f"{rank}.part"
    part.write_bytes(pickle.dumps((value, error)))
    part.rename(Path(directory) / str(rank))  # whole, or not there
    if error:
        os._exit(1)
    distributed.barrier()
    distributed.destroy_process_group()
