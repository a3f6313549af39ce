"""What a planted mistake is, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from mxref.verification.studies.steps.honest import Runtime

__all__ = ["Fault", "fault"]

R = TypeVar("R", bound=type[Runtime])


@dataclass(frozen=True)
class Fault:
    """One planted mistake.

    Attributes:
        name: unique, in words.
        mistake: what a person does wrong.
        check: that must name it.
        case: that shows it.
        ranks: of a world that shows it.
        make: the step with it.
    """

    name: str
    mistake: str
    check: str
    case: str
    ranks: int
    make: type[Runtime]


def fault(name: str, mistake: str, *, check: str, case: str, ranks: int = 2) -> Callable[[R], R]:
    """Marks a class as a planted mistake, its attribute `planted`; it stays a class, which ranks find by its name."""

    def mark(make: R) -> R:
        make.planted = Fault(name, mistake, check, case, ranks, make)  # type: ignore[attr-defined]
        return make

    return mark
