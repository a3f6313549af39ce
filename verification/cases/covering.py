"""Covering arrays: few rows of classes in which every legal pair, or every triple, of classes occurs.

Each row starts from a combination that is not covered yet and is filled dimension by dimension with the class that
covers most new combinations: the greedy scheme of AETG (Cohen, Dalal, Fredman and Patton, IEEE Transactions on Software
Engineering 23(7), 1997), ties broken by a seed, so that another seed covers again otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

import numpy as np
import numpy.typing as npt

from mxref.verification.cases.domain import Dimension, Exclusion

_TRIES = {2: 12, 3: 2}
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


def combinations_of(legal: Pairs, sizes: Sequence[int], strength: int) -> set[Row]:
    """Every legal combination of `strength` classes of different dimensions, each as ascending class numbers."""
    starts = np.cumsum([0, *sizes[:-1]])
    ranges = [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    found = set()
    for chosen in combinations(ranges, strength):
        for row in product(*chosen):
            if all(legal[a, b] for a, b in combinations(row, 2)):
                found.add(row)
    return found


def covering_array(
    dimensions: Sequence[Dimension], exclusions: Sequence[Exclusion], strength: int, seed: int
) -> list[Row]:
    """Rows that cover every legal combination of `strength` classes; a class of each dimension, by its index there.

    A combination that no whole row can hold, because of what the other dimensions exclude, is left out.
    """
    sizes = [len(dimension.classes) for dimension in dimensions]
    starts = np.cumsum([0, *sizes[:-1]])
    legal = legal_pairs(dimensions, exclusions)
    open_ = combinations_of(legal, sizes, strength)
    draw = np.random.default_rng(seed)
    waiting = [tuple(row) for row in draw.permutation(sorted(open_)).tolist()]
    rows: list[Row] = []
    while waiting:
        first = waiting.pop()
        if first not in open_:
            continue
        tries = [_fill(list(first), open_, legal, starts, sizes, strength, draw) for _ in range(_TRIES[strength])]
        found = [row for row in tries if row is not None]
        open_.discard(first)
        if not found:
            continue
        row = max(found, key=lambda row: sum(each in open_ for each in combinations(row, strength)))
        open_.difference_update(combinations(row, strength))
        rows.append(tuple(int(each - start) for each, start in zip(row, starts, strict=True)))
    return rows


def _fill(
    chosen: list[int],
    open_: set[Row],
    legal: Pairs,
    starts: npt.NDArray[np.int64],
    sizes: Sequence[int],
    strength: int,
    draw: np.random.Generator,
) -> Row | None:
    """A whole row around the chosen classes, or None where there is none."""
    dimension_of = np.repeat(np.arange(len(sizes)), sizes)
    left = [d for d in draw.permutation(len(sizes)).tolist() if d not in {int(dimension_of[c]) for c in chosen}]
    # Dimensions that the choice so far restricts most come first, so that a row seldom runs into a dead end.
    left.sort(key=lambda d: int(legal[chosen][:, starts[d] : starts[d] + sizes[d]].all(0).sum()))
    while left:
        dimension = left.pop(0)
        classes = [
            c for c in draw.permutation(np.arange(starts[dimension], starts[dimension] + sizes[dimension])).tolist()
            if all(legal[c, other] for other in chosen) and _leaves_room(c, chosen, left, legal, starts, sizes)
        ]  # fmt: skip
        if not classes:
            return None
        fixed = list(combinations(chosen, strength - 1))
        best = max(classes, key=lambda c: sum(tuple(sorted((*others, c))) in open_ for others in fixed))
        chosen.append(best)
    return tuple(sorted(chosen))


def _leaves_room(
    candidate: int,
    chosen: Sequence[int],
    left: Sequence[int],
    legal: Pairs,
    starts: npt.NDArray[np.int64],
    sizes: Sequence[int],
) -> bool:
    """Whether every dimension that is left still has a legal class."""
    together: Pairs = np.logical_and.reduce(legal[[*chosen, candidate]])
    return all(bool(together[starts[d] : starts[d] + sizes[d]].any()) for d in left)
