"""Questions for ranks that do not come back, and steps that no gate should pass."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist

from mxref.kernels.models.sizes import Batch
from mxref.verification.distributed.questions import Groups, Place


@dataclass(frozen=True)
class Ask:
    """Rank `who` does something else than the others, which sum their numbers."""

    what: str
    who: int = 1

    def __call__(self, place: Place) -> Any:
        group = place.group(Groups(ranks=(tuple(range(dist.get_world_size())),)))
        if place.rank == self.who and self.what:
            return getattr(self, self.what)(place)
        total = torch.tensor([float(place.rank)])
        dist.all_reduce(total, group=group)
        return float(total)

    def returns(self, place: Place) -> str:
        """Skips the sum."""
        return "early"

    def raises(self, place: Place) -> None:
        raise ValueError("three is too many")

    def exits(self, place: Place) -> None:
        os._exit(0)

    def is_killed(self, place: Place) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def faults(self, place: Place) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def spins(self, place: Place) -> None:
        while True:
            pass

    def computes(self, place: Place) -> str:
        """Takes its time, and comes back."""
        end = time.process_time() + 1.5
        while time.process_time() < end:
            pass
        total = torch.tensor([float(place.rank)])
        dist.all_reduce(total, group=place.group(Groups(ranks=(tuple(range(dist.get_world_size())),))))
        return "late"

    def returns_what_nobody_can_send(self, place: Place) -> Any:
        return lambda: None


def returns_nothing(*arguments: Any) -> None:
    """A step without a result."""


returns_nothing.mxref_loss = "mean"  # type: ignore[attr-defined]


def declares_nonsense(*arguments: Any) -> None:
    """A step whose declaration nobody understands."""


declares_nonsense.mxref_reduction = "float64, sideways"  # type: ignore[attr-defined]


_BATCH = Batch(1, 8)


@dataclass(frozen=True)
class Raises:
    """A question in the place of `verification.models.together.Together`'s, which rank 1 answers so."""

    said: str
    side: str = "packed"
    way: str = "fsdp"
    batch: Batch = _BATCH
    layers: int = 1

    def __call__(self, place: Any) -> Any:
        if place.rank == 1:
            raise RuntimeError(self.said)
