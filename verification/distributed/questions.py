"""What a rank is asked, as data: each question is called in the rank's own process, and its answer sent back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup

from mxref.verification.candidates.answer import UnusableAnswerError
from mxref.verification.distributed.protocol import Batch, Declared, Model, Saved, Step, Trained, declared

__all__ = ["Describe", "Groups", "MakeStep", "Place", "Read", "Train"]

T = TypeVar("T")
MakeStep = Callable[[], Any]
"""Makes a training step in a rank's process: a class, or a loader of somebody's callable."""


NCCL_TIMEOUT = timedelta(seconds=300)
"""Of a collective: who asks cannot see that a rank waits, for it uses a processor while its GPU does. Ranks with cold
caches compile all the same kernels meanwhile, each for itself."""


@dataclass(frozen=True)
class Groups:
    """Process groups side by side: the ranks of each, and which of several with these ranks, counted from 0."""

    ranks: tuple[tuple[int, ...], ...]
    number: int = 0

    def of(self, rank: int) -> int:
        """Number of the group that a rank of the world is in."""
        return next(number for number, ranks in enumerate(self.ranks) if rank in ranks)


@dataclass(frozen=True)
class Place:
    """Where a rank is: its number in the world, its device, and the groups that it has made."""

    rank: int
    device: torch.device
    made: dict[Groups, ProcessGroup]

    @property
    def timeout(self) -> timedelta | None:
        """Of collectives; None for the backend's own."""
        return NCCL_TIMEOUT if self.device.type == "cuda" else None

    def group(self, groups: Groups) -> ProcessGroup:
        """The rank's own of several groups; every rank of the world asks for them, for they are made together."""
        if groups not in self.made:
            made = [dist.new_group(list(ranks), timeout=self.timeout) for ranks in groups.ranks]
            self.made[groups] = next(
                group for group, ranks in zip(made, groups.ranks, strict=True) if self.rank in ranks
            )
        return self.made[groups]


@dataclass(frozen=True)
class Describe:
    """What does the step declare?"""

    make: MakeStep

    def __call__(self, place: Place) -> Declared:
        """The declaration; ValueError where it is not understood or there is no such step."""
        return declared(self.make())


@dataclass(frozen=True)
class Train:
    """Train on this rank's batches.

    Attributes:
        make: makes the step.
        model, batches: what it gets.
        groups: of the world.
        folder: of this rank's group.
    """

    make: MakeStep
    model: Model
    batches: tuple[Batch, ...]
    groups: Groups
    folder: Path

    def __call__(self, place: Place) -> Trained:
        """What the step gives, on the CPU."""
        model, batches = _moved(self.model, place.device), tuple(_moved(each, place.device) for each in self.batches)
        trained = self.make()(model, batches, place.group(self.groups), self.folder)
        return _moved(_usable(trained, Trained), torch.device("cpu"))


@dataclass(frozen=True)
class Read:
    """Read what was saved."""

    make: MakeStep
    folder: Path

    def __call__(self, place: Place) -> Saved:
        """What the step's own loader reads, on the CPU."""
        return _moved(_usable(self.make().mxref_load(self.folder), Saved), torch.device("cpu"))


def _moved(x: T, device: torch.device) -> T:
    """A dataclass with its tensors, and those of dataclasses inside, on a device; detached."""
    changed: dict[str, Any] = {}
    assert is_dataclass(x)
    for field in fields(x):
        value = getattr(x, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = value.detach().to(device)
        elif isinstance(value, tuple):
            changed[field.name] = tuple(_moved(each, device) for each in value)
    moved: T = replace(x, **changed)  # type: ignore[type-var]
    return moved


def _usable(x: Any, kind: type[T]) -> T:
    """What a step returned, if it is what it should be.

    Raises:
        UnusableAnswerError: it is something else, or holds something else than plain tensors.
    """
    if not isinstance(x, kind):
        raise UnusableAnswerError(f"returned {type(x).__name__}; expected {kind.__name__} of distributed.protocol")
    for field in fields(x):  # type: ignore[arg-type]
        value = getattr(x, field.name)
        if field.name == "steps":
            if not isinstance(value, tuple):
                raise UnusableAnswerError(f"{kind.__name__}.steps is {type(value).__name__}; expected a tuple of Step")
            for each in value:
                _usable(each, Step)
        elif type(value) not in (Tensor, torch.nn.Parameter) and (value is not None or "None" not in str(field.type)):
            raise UnusableAnswerError(
                f"{kind.__name__}.{field.name} is {type(value).__name__}; expected a plain tensor (of a DTensor, what "
                "full_tensor() gives)"
            )
    return x
