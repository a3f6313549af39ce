"""Suites that cover the domain: a case for each row of a covering array."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import cycle
from typing import Any, Literal
from zlib import crc32

import torch

from mxref.verification.cases.call import REPEATED, Call
from mxref.verification.cases.case import Case
from mxref.verification.cases.covering import covering_array
from mxref.verification.cases.domain import Class, Dimension, Expense, dimensions_for, living
from mxref.verification.cases.exclusions import EXCLUDED
from mxref.verification.cases.integer import keeps_sums_exact

_WORD = {2: "pairs", 3: "triples"}
_PAIRED = 100.0
"""Seconds from which on a class is costly: what needs triples has it in pairs."""
_HIDING = {("rows", "none"), ("routing", "all sentinels")}
"""Classes beside which all results are zero, or there are none, whatever the other classes are."""
EXACT_SLOTS = 32
"""Gates a token, at most, whose sum is exact in any order in 16 bits."""


def domain_cases(
    strength: int,
    dtypes: Sequence[torch.dtype],
    expense: Expense,
    seed: int,
    within: Callable[[list[Dimension]], list[Dimension]] = lambda dimensions: dimensions,
) -> list[Case]:
    """Cases in which every legal pair (`strength` 2) or triple (3) of classes occurs; another seed, other cases.

    Costly classes, those that take `_PAIRED` seconds or more, occur in pairs only; so do classes that hide the others,
    and no case that has one counts for a pair or triple of others.

    A name ends in four digits for the classes: a case of another domain that has the same number is another case.

    Args:
        strength: 2 or 3.
        dtypes: activation dtypes that are judged.
        expense: whether costly classes have stand-ins.
        seed: of the array.
        within: the dimensions without classes that are not asked for.
    """
    dimensions = living(within(dimensions_for(dtypes, expense)))
    if strength == 2:
        return _covering(dimensions, 2, seed)
    cheap = without_costly(dimensions)
    kept = {(d.name, each.name) for d in cheap for each in d.classes}
    paired = [case for case in _covering(dimensions, 2, seed) if not kept.issuperset(case.covers)]
    return [*_covering(cheap, strength, seed), *paired]


def without_costly(dimensions: Sequence[Dimension]) -> list[Dimension]:
    """The dimensions without their costly classes, where others are left."""
    return _without({(d.name, each.name) for d in dimensions for each in d.classes if each.cost >= _PAIRED}, dimensions)


def without_hiding(dimensions: Sequence[Dimension]) -> list[Dimension]:
    """The dimensions without their classes that hide the others, where others are left."""
    return _without(_HIDING, dimensions)


def _without(names: Collection[tuple[str, str]], dimensions: Sequence[Dimension]) -> list[Dimension]:
    kept = [(d, tuple(each for each in d.classes if (d.name, each.name) not in names)) for d in dimensions]
    return living([Dimension(d.name, classes or d.classes) for d, classes in kept])


def _covering(dimensions: Sequence[Dimension], strength: int, seed: int) -> list[Case]:
    """A case for each row of covering arrays; a class that has several numbers takes them in turn."""
    cases, turns = list[Case](), {(d.name, each.name): cycle(each.turns) for d in dimensions for each in d.classes}
    telling = without_hiding(dimensions)
    parts = [(telling, strength), *((part, 1) for part in _beside_each_hiding(dimensions, telling))]
    for part, of in parts:
        for row in covering_array(part, EXCLUDED, of, seed):
            classes = {d.name: next(turns[d.name, d.classes[i].name]) for d, i in zip(part, row, strict=True)}
            chosen = (f"{name}={each.name}{[*each.case.values()]}" for name, each in classes.items())
            digits = crc32(" ".join(chosen).encode()) & 0xFFFF
            cases.append(case_of(f"{_WORD[strength]} {len(cases)} {digits:04x}", classes))
    return cases


def _beside_each_hiding(dimensions: Sequence[Dimension], telling: Sequence[Dimension]) -> Iterator[list[Dimension]]:
    """For each class that was left out, the dimensions with it alone in its own: rows that have each class once."""
    for d, rest in zip(dimensions, telling, strict=True):
        for hiding in (each for each in d.classes if each not in rest.classes):
            yield living([Dimension(d.name, (hiding,)) if other is d else other for other in dimensions])


def case_of(name: str, classes: dict[str, Class]) -> Case:
    """The case that a class of each dimension describes: exact where such a draw exists, otherwise by intervals."""
    fields: dict[str, Any] = {}
    how: dict[str, Any] = {}
    for each in classes.values():
        fields |= each.case
        how |= each.call
    gated, rows, apart = (fields.pop(name, none) for name, none in (("gated", False), ("rows", 0), ("apart", None)))
    repeated = {how[name] for name in ("x", "A", "B", "dOut")} & {*REPEATED}
    repeated |= {how["biases"], how["gates"]} & {"overlapping"}
    if rows:
        fields["tokens"] = -(-rows // fields["top_k"])
    if gated:
        fields.setdefault("gate_slots", slots_of(gated, fields["tokens"] * fields["top_k"], fields["top_k"]))
    if apart is not None:
        fields["own_dtypes"] = dtypes_apart(apart, fields["dtype"])
    # Sums of as many equal terms, or of all rows, are large.
    exact = keeps_sums_exact(fields["scaling"]) and not repeated and fields.get("gate_slots", 0) <= EXACT_SLOTS
    exact &= "off_grid_weights" not in fields
    fields.setdefault("data", "integer" if exact else "balanced")
    covers = tuple((dimension, each.name) for dimension, each in classes.items())
    return Case(name, **fields, call=Call(**how), covers=covers)


def dtypes_apart(number: int, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Of the parameters where all but one, of that number, have the activations' dtype."""
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    return tuple(other if each == number else dtype for each in range(4))


def slots_of(gated: Literal[True, "other", "across", "all"], rows: int, slots: int) -> int:
    """g: as many gates a token as it has slots, or, where the rows can be divided so, another number of them.

    other: the least other than one.  across: the least that neither divides the slots nor is a multiple of them, so
    that one row of x feeds several outputs.  all: one token has all gates, [1, P].
    """
    if gated is True:
        return slots
    if gated == "all":
        return max(rows, 1)
    others = [g for g in range(2, rows + 1) if rows % g == 0 and g != slots]
    across = [g for g in others if g % slots and slots % g]
    return (across if gated == "across" and across else [*others, 1])[0]
