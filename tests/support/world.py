"""Ranks of the tests, run and watched as the gate of steps does it: on the CPU (gloo), their kernels interpreted.

With MXREF_RANKS=nccl in the environment each rank has a GPU, and its kernels are compiled; what it is compared with
stays one process on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from typing import Any

import pytest
import torch
from torch import Tensor

from mxref.verification.candidates.own.interpret_only import interpret_only
from mxref.verification.distributed.questions import Place
from mxref.verification.distributed.ranks import Raised
from mxref.verification.distributed.world import Lost, World

ON_GPUS = os.environ.get("MXREF_RANKS") == "nccl"
_GRACE = 60.0
"""Seconds for ranks that are still to answer once one has failed; so many that they pass only where something hangs."""
_PRELOADED = [
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "transformers.trainer",
    "transformers.models.gpt_oss.modeling_gpt_oss",
    "mxref.kernels.models.peft",
]
"""Imported once, by the server that every rank is forked from."""


@dataclass(frozen=True)
class _Work:
    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __call__(self, place: Place) -> Any:
        if not ON_GPUS:
            interpret_only(report_overflow=True)
        return _on_cpu(self.function(*self.arguments))


def rank_device() -> torch.device:
    """Where a rank's tensors and meshes are."""
    return torch.device("cuda", torch.cuda.current_device()) if ON_GPUS else torch.device("cpu")


def possible(ranks: int) -> bool:
    """Whether so many can run here."""
    return not ON_GPUS or ranks <= torch.cuda.device_count()


def assert_same(got: Tensor, expected: Tensor, what: object = None) -> None:
    """The same bits; from a GPU, of sums that are not exact, the same up to their order and functions' last bits."""
    if not ON_GPUS:
        assert torch.equal(got, expected), what
        return
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * scale, msg=lambda said: f"{what}: {said}")


def run(work: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """Every rank's answer in a world of `size` processes that each run `work(*arguments)`, a function of a module.

    Raises:
        AssertionError: a rank failed; the message names it.
    """
    answers = _ask(work, size, arguments)
    failed = {rank: answer for rank, answer in enumerate(answers) if isinstance(answer, Raised | Lost)}
    told = [f"rank {r} {'raised' if isinstance(a, Raised) else a.how}\n{a.trace}" for r, a in failed.items()]
    assert not failed, "\n".join(told)
    return answers


def errors(work: Callable[..., Any], size: int, *arguments: Any) -> list[str]:
    """The last line of every rank's traceback; all must have raised."""
    answers = _ask(work, size, arguments)
    assert all(isinstance(answer, Raised) for answer in answers), answers
    return [answer.trace.rpartition("\n")[2] for answer in answers]


def _ask(work: Callable[..., Any], size: int, arguments: tuple[Any, ...]) -> list[Any]:
    if not possible(size):
        pytest.skip(f"{size} ranks need a GPU each")
    serve()
    with _environment(), World(size, "cuda" if ON_GPUS else "cpu", grace=_GRACE) as world:
        return world.ask([_Work(work, arguments)] * size)


def serve() -> None:
    """Start the server, if none runs.

    For ranks on GPUs it imports nothing: a library that looks for a GPU when it is imported leaves none to its forks.
    """
    get_context("forkserver").set_forkserver_preload([] if ON_GPUS else _PRELOADED)
    with _environment():
        forkserver.ensure_running()


@contextmanager
def _environment() -> Iterator[None]:
    """The ranks': without GPUs of their own they interpret kernels also where there is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", str(int(not ON_GPUS)))
        yield


def _on_cpu(found: Any) -> Any:
    """What a rank found, its tensors in the CPU's memory."""
    if isinstance(found, Tensor):
        return found.cpu()
    if isinstance(found, dict):
        return {key: _on_cpu(value) for key, value in found.items()}
    return [_on_cpu(value) for value in found] if isinstance(found, list) else found
