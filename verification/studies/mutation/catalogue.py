"""All mutants of the kernels' sources as they are now: those by hand, and the systematic ones."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

from mxref.verification.studies.mutation.bug import Bug, Equivalent, plant
from mxref.verification.studies.mutation.bugs import KERNEL_BUGS
from mxref.verification.studies.mutation.bugs_activation import ACTIVATION_BUGS
from mxref.verification.studies.mutation.bugs_fragments import FRAGMENTS_BUGS
from mxref.verification.studies.mutation.bugs_hopper import HOPPER_BUGS
from mxref.verification.studies.mutation.bugs_host import HOST_BUGS
from mxref.verification.studies.mutation.equivalents import PORTABLE
from mxref.verification.studies.mutation.equivalents_hopper import HOPPER
from mxref.verification.studies.mutation.locate import StaleMutantError
from mxref.verification.studies.mutation.mutant import Mutant
from mxref.verification.studies.mutation.sources import Place, Source
from mxref.verification.studies.mutation.sweep import sweep

BUGS: tuple[tuple[Place, Bug], ...] = (*KERNEL_BUGS, *ACTIVATION_BUGS, *HOPPER_BUGS, *FRAGMENTS_BUGS, *HOST_BUGS)
"""By hand."""

EQUIVALENTS: tuple[tuple[Place, Equivalent], ...] = (*PORTABLE, *HOPPER)
"""Mutants of the sweep that change nothing."""


def catalogue(sources: Mapping[str, Source]) -> list[Mutant]:
    """All mutants, those by hand first; a systematic one that repeats one by hand is left out.

    Raises:
        StaleMutantError: one by hand no longer fits.
    """
    by_hand = [plant(place, bug, sources) for place, bug in BUGS]
    known = {mutant.change for mutant in by_hand}
    return by_hand + [m for source in sources.values() for m in sweep(source) if m.change not in known]


def arguments(mutants: Iterable[Mutant], sources: Mapping[str, Source]) -> dict[str, str]:
    """Name -> why the mutant changes nothing, for those of which that is said."""
    changes = dict[tuple[str, int, int, str], str]()
    for place, entry in EQUIVALENTS:
        try:
            changes |= {mutant.change: entry.argument for mutant in entry.mutants(place, sources)}
        except StaleMutantError:  # it speaks of nothing here: its mutants, if there are any, survive unexplained
            continue
    return {mutant.name: changes[mutant.change] for mutant in mutants if mutant.change in changes}


def stratified(mutants: Iterable[Mutant], size: int, seed: int) -> list[Mutant]:
    """A sample that takes the functions in turn, and within a function the kinds of mistake in turn.

    Args:
        mutants: what to choose from.
        size: how many; all of them if there are fewer.
        seed: of the choice.
    """
    draw = random.Random(seed)
    strata: dict[Place, dict[str, list[Mutant]]] = {}
    for mutant in mutants:
        strata.setdefault(mutant.place, {}).setdefault(mutant.category, []).append(mutant)
    queues = [_in_turn([draw.sample(kind, len(kind)) for kind in kinds.values()], draw) for kinds in strata.values()]
    return _in_turn(queues, draw)[:size]


def _in_turn(queues: Sequence[list[Mutant]], draw: random.Random) -> list[Mutant]:
    """One from each queue, in a drawn order, and again until all are empty."""
    queues = draw.sample(list(queues), len(queues))
    longest = max(map(len, queues), default=0)
    return [queue[i] for i in range(longest) for queue in queues if i < len(queue)]
