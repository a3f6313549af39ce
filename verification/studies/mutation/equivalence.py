"""One mutant that changes nothing, named by what a reader sees: the function and the edited lines before and after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mxref.verification.studies.mutation.mutant import Mutant, Source

__all__ = ["Equivalent", "each"]


@dataclass(frozen=True)
class Equivalent:
    """One mutant, by function and lines, and why no input tells it from the sources.

    `below`: how the line after them begins, where the same edit is possible in several places.
    """

    function: str
    before: str
    after: str
    argument: str
    below: str = ""

    def covers(self, mutant: Mutant, sources: Mapping[str, Source]) -> bool:
        """Whether it speaks of this mutant."""
        text = sources[mutant.file].text
        edit, below = mutant.edit(text), "".join(text.splitlines()[mutant.line :][:1]).strip()
        return (mutant.function, *edit) == (self.function, self.before, self.after) and below.startswith(self.below)


def each(function: str, before: str, afters: Iterable[str], argument: str, below: str = "") -> tuple[Equivalent, ...]:
    """Several edits of one line for one reason."""
    return tuple(Equivalent(function, before, after, argument, below) for after in afters)
