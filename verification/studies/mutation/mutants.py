"""The catalogue of planted bugs: all mutants of the kernels' sources as they are now."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from mxref.verification.studies.mutation.catalogue import KERNEL_BUGS
from mxref.verification.studies.mutation.catalogue_hopper import HOPPER_BUGS
from mxref.verification.studies.mutation.catalogue_host import HOST_BUGS
from mxref.verification.studies.mutation.mutant import Bug, Mutant, Source, StaleMutantError, locate, read_sources
from mxref.verification.studies.mutation.sweep import sweep

__all__ = ["BUGS", "Mutant", "StaleMutantError", "catalogue", "read_sources", "stratified"]

BUGS: tuple[Bug, ...] = (*KERNEL_BUGS, *HOPPER_BUGS, *HOST_BUGS)
"""By hand."""


def catalogue(sources: dict[str, Source]) -> list[Mutant]:
    """All mutants, those by hand first; a systematic one that repeats one by hand is left out.

    Raises:
        StaleMutantError: one by hand no longer fits.
    """
    by_hand = [locate(bug, sources) for bug in BUGS]
    known = {(mutant.file, mutant.apply(sources[mutant.file].text)) for mutant in by_hand}
    systematic = [mutant for source in sources.values() for mutant in sweep(source)]
    fresh = [m for m in systematic if (m.file, m.apply(sources[m.file].text)) not in known]
    return by_hand + fresh


def stratified(mutants: Iterable[Mutant], size: int, seed: int) -> list[Mutant]:
    """A sample that takes the functions in turn, and within a function the kinds of mistake in turn.

    Args:
        mutants: what to choose from.
        size: how many; all of them if there are fewer.
        seed: of the choice.
    """
    draw = random.Random(seed)
    strata: dict[tuple[str, str], dict[str, list[Mutant]]] = {}
    for mutant in mutants:
        strata.setdefault((mutant.file, mutant.function), {}).setdefault(mutant.category, []).append(mutant)
    queues = [_in_turn([draw.sample(kind, len(kind)) for kind in kinds.values()], draw) for kinds in strata.values()]
    return _in_turn(queues, draw)[:size]


def _in_turn(queues: Sequence[list[Mutant]], draw: random.Random) -> list[Mutant]:
    """One from each queue, in a drawn order, and again until all are empty."""
    queues = draw.sample(list(queues), len(queues))
    longest = max(map(len, queues), default=0)
    return [queue[i] for i in range(longest) for queue in queues if i < len(queue)]
