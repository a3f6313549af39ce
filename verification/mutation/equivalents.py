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


_NOT_STORED = (
    "The rows in question lie in 0..P-1, so nothing outside is read; `keep` stores rows below `end` only, "
    "and a row's sum meets no other row."
)
_BELOW_2_31 = (
    "A row number is below P < 2^31: tiles and the inverse hold rows in 32 bits. "
    "The other end of the range keeps 64 bits, and so do the rows between them."
)
_NO_ROWS = (
    "A tile with begin >= end has no row below `end`: every mask is false, nothing is stored, and the weights that are "
    "read are those of expert 0, which there always is."
)
_ONE_HEIGHT = "A routing belongs to one call, and all products of a call have its configuration's BLOCK_M: one entry."
_CACHE = "The table is a function of the routing and the height alone: made anew it is the same."

EQUIVALENTS: tuple[Equivalent, ...] = (
    Equivalent(
        "grouped_matmul_kernel",
        "source, live = source_rows(rows, rows < end, positions, fan_in, P)",
        "source, live = source_rows(rows, rows < P, positions, fan_in, P)",
        _NOT_STORED,
    ),
    Equivalent("grouped_matmul_kernel", "return", "pass", _NO_ROWS),
    Equivalent("Routing.tiles", "if block_m not in self._tiles:", "if True:", _CACHE),
    Equivalent("Routing.tiles", "if block_m not in self._tiles:", "if not self._tiles:", _ONE_HEIGHT),
    Equivalent(
        "expert_rows",
        "end = tl.load(offsets + expert).to(tl.int64)",
        "end = tl.load(offsets + expert).to(tl.int32)",
        _BELOW_2_31,
    ),
)


def argument_for(mutant: Mutant, sources: Mapping[str, Source]) -> str | None:
    """Why the mutant is declared equivalent, or None."""
    return next((entry.argument for entry in EQUIVALENTS if entry.covers(mutant, sources)), None)


def stale(mutants: Iterable[Mutant], sources: Mapping[str, Source]) -> list[Equivalent]:
    """Entries that speak of no mutant of the catalogue."""
    mutants = list(mutants)
    return [entry for entry in EQUIVALENTS if not any(entry.covers(mutant, sources) for mutant in mutants)]
