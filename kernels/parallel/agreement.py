"""What must be the same on every rank, compared before training; a rank that differs or stays away is named on all."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

__all__ = ["WAIT", "check_ranks_agree", "exchange", "failing_together"]

WAIT = 300.0
"""Seconds that ranks wait for each other unless they are told otherwise."""

_LIBRARIES = ("mxref", "torch", "triton", "transformers", "accelerate", "peft")
_calls: dict[tuple[int, ...], Iterator[int]] = defaultdict(itertools.count)
"""Calls of `exchange` so far, by the ranks of the group."""


def check_ranks_agree(model: nn.Module, *, seed: bool = False, wait: float = WAIT) -> None:
    """Whether all ranks hold the same model; call it before sharding, and again after.

    Compared are library versions and every parameter and buffer: name, shape, dtype, whether it trains, and values, or
    the layout where it is sharded.

    Args:
        seed: compare the CPU's random states too, which must agree where ranks share tokens.
        wait: seconds.

    Raises:
        ValueError: on every rank; which ranks differ, and in what.
        TimeoutError: on every rank that is there; which ranks are not.
    """
    facts = {f"version of {name}": _version(name) for name in _LIBRARIES}
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    facts |= {name: _described(tensor) for name, tensor in tensors}
    if seed:
        facts["state of random numbers"] = _digest(torch.get_rng_state())
    answers = exchange(facts, wait)
    if different := [name for name in _names(answers) if len({answer.get(name) for answer in answers}) > 1]:
        shown = "; ".join(_difference(name, answers) for name in different[:3])
        raise ValueError(f"the ranks differ in {len(different)} things: {shown}")


def exchange(facts: Mapping[str, str], wait: float = WAIT, group: ProcessGroup | None = None) -> list[dict[str, str]]:
    """Every rank's facts, in the group's order; a collective through the store, so that none waits forever.

    Raises:
        TimeoutError: on every rank that is there; which ranks are not.
    """
    store = distributed.distributed_c10d._get_default_store()
    ranks = distributed.get_process_group_ranks(group)
    call = next(_calls[tuple(ranks)])
    keys = [f"mxref/{ranks}/{call}/{rank}" for rank in ranks]
    store.set(keys[distributed.get_rank(group)], json.dumps(dict(facts)))
    try:
        store.wait(keys, timedelta(seconds=wait))
    except RuntimeError as error:  # what stores raise when time is up
        absent = [rank for rank, key in zip(ranks, keys, strict=True) if not store.check([key])]
        raise TimeoutError(
            f"ranks {absent} of {len(ranks)} did not come within {wait:g} s; see their own output"
        ) from error
    return [json.loads(store.get(key)) for key in keys]


@contextmanager
def failing_together(wait: float = WAIT, group: ProcessGroup | None = None) -> Iterator[None]:
    """What some ranks do alone, such as writing a file: if one fails, all of the group do.

    Raises:
        RuntimeError: on every other rank; which ranks failed, and why.
        TimeoutError: as `exchange`.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    try:
        answers = exchange({} if error is None else {"error": f"{type(error).__name__}: {error}"}, wait, group)
    except TimeoutError as late:
        if error is None:
            raise
        raise error from late
    if error is not None:
        raise error
    of_ranks = zip(distributed.get_process_group_ranks(group), answers, strict=True)
    if failed := [f"rank {rank}: {answer['error']}" for rank, answer in of_ranks if answer]:
        raise RuntimeError("; ".join(failed))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def _described(tensor: Tensor) -> str:
    kind = f"{list(tensor.shape)} {tensor.dtype}{' trained' if tensor.requires_grad else ''}"
    return f"{kind} {tensor.placements}" if isinstance(tensor, DTensor) else f"{kind} {_digest(tensor)}"


def _digest(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "no data"
    data: Any = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=6).hexdigest()


def _names(answers: list[dict[str, str]]) -> dict[str, None]:
    return dict.fromkeys(name for answer in answers for name in answer)


def _difference(name: str, answers: list[dict[str, Any]]) -> str:
    """As in: "lm_head.weight: ranks 0, 2 have [48, 64] torch.float32 8a61…, ranks 1 have nothing"."""
    holders = defaultdict(list)
    for rank, answer in enumerate(answers):
        holders[answer.get(name, "nothing")].append(str(rank))
    return f"{name}: " + ", ".join(f"ranks {', '.join(ranks)} have {what}" for what, ranks in holders.items())
