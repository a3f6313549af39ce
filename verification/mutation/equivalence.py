"""One mutant that changes nothing, named by what a reader sees: the function and the edited lines before and after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mxref.verification.mutation.mutant import Mutant, Source

__all__ = ["Equivalent", "each"]


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


def each(function: str, before: str, afters: Iterable[str], argument: str) -> tuple[Equivalent, ...]:
    """Several edits of one line for one reason."""
    return tuple(Equivalent(function, before, after, argument) for after in afters)
