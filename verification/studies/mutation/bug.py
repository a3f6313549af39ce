"""What a person writes down of a mutant: a bug to plant, or a systematic one that changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from mxref.verification.studies.mutation.locate import Edit, locate
from mxref.verification.studies.mutation.mutant import Mutant
from mxref.verification.studies.mutation.sources import Place, Source

T = TypeVar("T")


@dataclass(frozen=True)
class Bug:
    """A mutant by hand.

    Attributes:
        name: unique, in words.
        category: what kind of mistake it is, such as "masks".
        why: how a person comes to write it, or what it breaks.
        before, after, within: see `Edit`.
        gpu_only: the interpreter cannot show it, although it runs the function.
    """

    name: str
    category: str
    why: str
    before: str
    after: str
    within: str = ""
    gpu_only: bool = False


@dataclass(frozen=True)
class Equivalent:
    """Mutants of one piece of code that change nothing.

    They must besides give the same bits as the sources on every fixture; one that a check rejected was no equivalent.

    Attributes:
        before, within: see `Edit`.
        afters: what the mutants make of it.
        argument: why no input tells them from the sources.
    """

    before: str
    afters: Sequence[str]
    argument: str
    within: str = ""

    def mutants(self, place: Place, sources: Mapping[str, Source]) -> list[Mutant]:
        """What it speaks of; see `locate` for what it raises."""
        edits = [Edit(self.before, after, self.within) for after in self.afters]
        return [locate(place, edit, sources, f"{edit.before} -> {edit.after}") for edit in edits]


def at(place: Place, *entries: T) -> Iterator[tuple[Place, T]]:
    """Several entries of a catalogue, all of one function."""
    return ((place, entry) for entry in entries)


def plant(place: Place, bug: Bug, sources: Mapping[str, Source]) -> Mutant:
    """The mutant that a bug is; see `locate` for what it raises."""
    mutant = locate(place, Edit(bug.before, bug.after, bug.within), sources, bug.name)
    gpu_only = bug.gpu_only or mutant.place.function in sources[mutant.place.file].gpu_only
    return replace(mutant, category=bug.category, why=bug.why, by_hand=True, gpu_only=gpu_only)
