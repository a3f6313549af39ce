"""Covering arrays: few rows of classes in which every legal pair, or every triple, of classes occurs.

Each row starts from a combination that is not covered yet and is filled dimension by dimension with the class that
covers most new combinations: the greedy scheme of AETG (Cohen, Dalal, Fredman and Patton, IEEE Transactions on Software
Engineering 23(7), 1997). Of equals the one that costs least is taken, and then a seed decides, so that another seed
covers again otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from itertools import combinations, permutations, product
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from mxref.verification.cases.domain import Dimension
from mxref.verification.cases.exclusions import Exclusion

_TRIES = {1: 12, 2: 12, 3: 3}
"""Rows that are built for each one taken: a tenth fewer are needed."""

Row = tuple[int, ...]
"""A class of each dimension, by index."""

Pairs = npt.NDArray[np.bool_]


def legal_pairs(dimensions: Sequence[Dimension], exclusions: Sequence[Exclusion]) -> Pairs:
    """Which two classes can be in one call: bool [C, C] over all classes of all dimensions, numbered through."""
    index = {
        (dimension.name, each.name): number
        for number, (dimension, each) in enumerate((d, c) for d in dimensions for c in d.classes)
    }
    legal = np.ones((len(index), len(index)), dtype=bool)
    for excluded in exclusions:
        for first, second in product(excluded.classes, excluded.others):
            pair = index.get((excluded.first, first)), index.get((excluded.second, second))
            if None not in pair:
                legal[pair], legal[pair[::-1]] = False, False
    start = 0
    for dimension in dimensions:
        stop = start + len(dimension.classes)
        legal[start:stop, start:stop] = np.eye(stop - start, dtype=bool)
        start = stop
    return legal


def combinations_of(legal: Pairs, sizes: Sequence[int], strength: int) -> npt.NDArray[np.int64]:
    """Every legal combination of `strength` classes of different dimensions, as ascending class numbers, in a row."""
    starts = np.cumsum([0, *sizes[:-1]])
    ranges = [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    found = list[npt.NDArray[np.int64]]()
    for chosen in combinations(ranges, strength):
        together = np.ones([len(each) for each in chosen], dtype=bool)
        for a, b in combinations(range(strength), 2):
            shape = [len(chosen[d]) if d in (a, b) else 1 for d in range(strength)]
            together &= legal[np.ix_(chosen[a], chosen[b])].reshape(shape)
        found.append(np.argwhere(together) + np.array([each.start for each in chosen]))
    every = np.concatenate(found)
    return every[np.lexsort(every.T[::-1])]


def covering_array(
    dimensions: Sequence[Dimension], exclusions: Sequence[Exclusion], strength: int, seed: int
) -> list[Row]:
    """Rows that cover every legal combination of `strength` classes; a class of each dimension, by its index there.

    A combination that no whole row can hold, because of what the other dimensions exclude, is left out.
    """
    sizes = tuple(len(dimension.classes) for dimension in dimensions)
    costs = tuple(each.cost for dimension in dimensions for each in dimension.classes)
    return list(_rows(sizes, costs, legal_pairs(dimensions, exclusions).tobytes(), strength, seed))


@cache
def _rows(
    sizes: tuple[int, ...], costs: tuple[float, ...], legal_bytes: bytes, strength: int, seed: int
) -> tuple[Row, ...]:
    """The rows for so many classes of each dimension, which cost so much; `legal_bytes`: of `legal_pairs`."""
    starts = np.cumsum([0, *sizes[:-1]])
    legal = np.frombuffer(legal_bytes, dtype=bool).reshape(sum(sizes), -1)
    missing = combinations_of(legal, sizes, strength)
    open_ = np.zeros((len(legal),) * strength, dtype=bool)  # symmetric: a combination in every order
    for order in permutations(range(strength)):
        open_[tuple(missing.T[list(order)])] = True
    restricted = _restricted(legal, starts, sizes)
    draw = np.random.default_rng(seed)
    waiting = [tuple(row) for row in draw.permutation(missing).tolist()]
    rows: list[Row] = []
    while waiting:
        first = waiting.pop()
        if not open_[first]:
            continue
        fill = partial(_fill, first, open_, restricted, starts, sizes, costs, draw)
        tries = [fill(widest_first=True) for _ in range(_TRIES[strength])]
        if not any(tries):
            tries = [fill(widest_first=False) for _ in range(_TRIES[strength])]
        found = [each for each in tries if each is not None]
        for order in permutations(first):
            open_[order] = False
        if not found:
            continue
        _, row = max(found, key=itemgetter(0))
        open_[np.ix_(*[row] * strength)] = False
        rows.append(tuple(int(each - start) for each, start in zip(row, starts, strict=True)))
    return tuple(rows)


def _restricted(legal: Pairs, starts: npt.NDArray[np.int64], sizes: Sequence[int]) -> list[list[tuple[int, int]]]:
    """For each class the dimensions of which it excludes some class, and which are left there, as bits."""
    ranges = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    return [[(d, _bits(row[own])) for d, own in enumerate(ranges) if not row[own].all()] for row in legal]


def _bits(flags: Pairs) -> int:
    return sum(1 << int(number) for number in np.flatnonzero(flags))


def _fill(
    first: Row,
    open_: npt.NDArray[np.bool_],
    restricted: Sequence[Sequence[tuple[int, int]]],
    starts: npt.NDArray[np.int64],
    sizes: Sequence[int],
    costs: Sequence[float],
    draw: np.random.Generator,
    widest_first: bool,
) -> tuple[int, Row] | None:
    """A whole row around the first classes, and how many open combinations it adds; None where it met a dead end.

    The widest dimensions decide how many rows there are; if those come first that the choice so far restricts most, a
    row seldom runs into a dead end.
    """
    chosen = list(first)
    held = set((np.searchsorted(starts, chosen, side="right") - 1).tolist())
    left = [d for d in draw.permutation(len(sizes)).tolist() if d not in held]
    possible = [(1 << size) - 1 for size in sizes]  # classes of each dimension, as bits; of one that is held its own
    for each in chosen:
        for d, rest in restricted[each]:
            possible[d] &= rest
    left.sort(key=[bits.bit_count() for bits in possible].__getitem__, reverse=widest_first)
    gain = np.zeros(len(restricted), dtype=int)  # open combinations of a class with chosen ones, in every order
    for count, best in enumerate(chosen):
        gain += _gained(open_, best, chosen[:count])
    covered = 0
    for dimension in left:
        start, bits = int(starts[dimension]), possible[dimension]
        classes = [
            start + each
            for each in draw.permutation(sizes[dimension]).tolist()
            if bits >> each & 1 and all(possible[d] & rest for d, rest in restricted[start + each])
        ]
        if not classes:
            return None
        classes.sort(key=costs.__getitem__)
        best = classes[int(gain[classes].argmax())]
        covered += int(gain[best])
        gain += _gained(open_, best, chosen)
        chosen.append(best)
        for d, rest in restricted[best]:
            possible[d] &= rest
    return covered, tuple(sorted(chosen))


def _gained(open_: npt.NDArray[np.bool_], best: int, chosen: Sequence[int]) -> npt.NDArray[Any]:
    """For every class, how many open combinations hold it and `best`, and else chosen classes, in every order."""
    if open_.ndim == 3:  # a row has fewer classes than a byte has values, and bytes are added up many at once
        found = np.add.reduce(open_[best].take(chosen, 0).view(np.uint8), 0, dtype=np.uint8)
        return np.asarray(2 * found.astype(int))
    return np.asarray(open_[best])
