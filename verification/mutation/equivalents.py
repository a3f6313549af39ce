"""Mutants that change nothing, each with an argument that covers all inputs.

An entry names a mutant by what a reader sees: the function and the edited lines before and after. A declared mutant
must besides give the same bits as the sources do on every fixture; one that a guard rejects was no equivalent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mxref.verification.mutation.mutant import Mutant, Source

__all__ = ["EQUIVALENTS", "Equivalent", "argument_for", "stale"]


@dataclass(frozen=True)
class Equivalent:
    """One mutant, by function and lines, and why no input tells it from the sources."""

    function: str
    before: str
    after: str
    argument: str

    def covers(self, mutant: Mutant, sources: Mapping[str, Source]) -> bool:
        """Whether it speaks of this mutant."""
        return mutant.function == self.function and mutant.edit(sources[mutant.file].text) == (self.before, self.after)


EQUIVALENTS: tuple[Equivalent, ...] = ()


def argument_for(mutant: Mutant, sources: Mapping[str, Source]) -> str | None:
    """Why the mutant is declared equivalent, or None."""
    return next((entry.argument for entry in EQUIVALENTS if entry.covers(mutant, sources)), None)


def stale(mutants: Iterable[Mutant], sources: Mapping[str, Source]) -> list[Equivalent]:
    """Entries that speak of no mutant of the catalogue."""
    mutants = list(mutants)
    return [entry for entry in EQUIVALENTS if not any(entry.covers(mutant, sources) for mutant in mutants)]
