"""Ranks of the tests: processes on the CPU (gloo), run and watched as the gate of steps does it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from typing import Any

from mxref.verification.distributed.questions import Place
from mxref.verification.distributed.ranks import Raised
from mxref.verification.distributed.world import Lost, World

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
        return self.function(*self.arguments)


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
    _serve_interpreted()
    with World(size, grace=_GRACE) as world:
        return world.ask([_Work(work, arguments)] * size)


def _serve_interpreted() -> None:
    """Start the server, whose kernels are interpreted also where there is a GPU."""
    get_context("forkserver").set_forkserver_preload(_PRELOADED)
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    forkserver.ensure_running()
    if before is None:
        del os.environ["TRITON_INTERPRET"]
