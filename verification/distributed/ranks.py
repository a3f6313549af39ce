"""A rank's own process: it joins its world, answers questions, and ends with whoever asks."""

from __future__ import annotations

import faulthandler
import os
import pickle
import resource
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from traceback import TracebackException
from typing import Any

import torch
from torch import distributed as dist

from mxref.verification.candidates.answer import UnusableAnswerError
from mxref.verification.candidates.processes import begin
from mxref.verification.distributed.questions import Place

__all__ = ["Raised", "serve"]


@dataclass(frozen=True)
class Raised:
    """What a question raised: in words, and the traceback without this module's frames."""

    what: str
    trace: str


def serve(
    rank: int, size: int, device_type: str, folder: Path, questions: Connection, environment: dict[str, str]
) -> None:
    """Answer until nobody asks any more.

    Args:
        rank, size: this rank's place.
        device_type: "cpu" or "cuda".
        folder: where ranks meet, and write their stacks when they crash or are sent SIGUSR1.
        questions: pickled callables of a `Place` come in; what they return, or `Raised`, goes out.
        environment: of who asks.
    """
    begin(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the asking process is interrupted, and ends this one
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(number) for name, number in here.items()}  # as torchrun sets them
    device = torch.device(device_type if device_type == "cpu" else f"cuda:{rank}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with (folder / f"stack-{rank}").open("w") as stack:
        faulthandler.enable(stack, all_threads=False)
        faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
        place, backend = Place(rank, device, {}), "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, f"file://{folder}/meeting", rank=rank, world_size=size, timeout=place.timeout)
        while True:
            try:
                question = pickle.loads(questions.recv_bytes())
            except EOFError:
                os._exit(0)  # no destroy_process_group: it would wait for ranks that hang
            questions.send_bytes(_answer(question, place))


def _answer(question: Any, place: Place) -> bytes:
    """What a question returns, pickled, or what it or the pickling raised."""
    try:
        return pickle.dumps(question(place))
    except BaseException as error:  # SIGINT is ignored here: it is the step's, as CheckpointException is
        said = (str(error).strip().splitlines() or [""])[0]
        what = said if isinstance(error, UnusableAnswerError) else f"{type(error).__name__}: {said}"
        told = TracebackException.from_exception(error)
        told.stack[:] = told.stack[2:] or told.stack  # without ours
        return pickle.dumps(Raised(what, "".join(told.format()).strip()))
