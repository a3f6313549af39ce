"""Suites that cover the domain: a case for each row of a covering array."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import frexp
from typing import Any

import torch

from mxref.verification.cases.call import REPEATED, Call
from mxref.verification.cases.case import Case
from mxref.verification.cases.covering import covering_array
from mxref.verification.cases.domain import Class, Dimension, Expense, dimensions_for, living
from mxref.verification.cases.exclusions import EXCLUDED

_WORD = {2: "pairs", 3: "triples"}


def domain_cases(
    strength: int,
    dtypes: Sequence[torch.dtype],
    expense: Expense,
    seed: int,
    within: Callable[[list[Dimension]], list[Dimension]] = lambda dimensions: dimensions,
) -> list[Case]:
    """Cases in which every legal pair (`strength` 2) or triple (3) of classes occurs; another seed, other cases.

    Args:
        strength: 2 or 3.
        dtypes: activation dtypes that are judged.
        expense: whether costly classes have stand-ins.
        seed: of the array.
        within: the dimensions without classes that are not asked for.
    """
    dimensions = living(within(dimensions_for(dtypes, expense)))
    cases = []
    for number, row in enumerate(covering_array(dimensions, EXCLUDED, strength, seed)):
        classes = {d.name: d.classes[index] for d, index in zip(dimensions, row, strict=True)}
        cases.append(case_of(f"{_WORD[strength]} {number}", classes))
    return cases


def case_of(name: str, classes: dict[str, Class]) -> Case:
    """The case that a class of each dimension describes: exact where such a draw exists, otherwise by intervals."""
    fields: dict[str, Any] = {}
    how: dict[str, Any] = {}
    for each in classes.values():
        fields |= each.case
        how |= each.call
    gated, rows = fields.pop("gated", False), fields.pop("rows", 0)
    repeated = {how.get(name) for name in ("x", "adapters", "dOut")} & {*REPEATED}
    power_of_two = abs(frexp(fields["scaling"])[0]) in (0.0, 0.5)
    exact = power_of_two and not repeated  # sums of as many equal terms are large
    fields.setdefault("data", "integer" if exact else "balanced")
    if rows:
        fields["tokens"] = -(-rows // fields["top_k"])
    if gated:
        slots = (
            fields["top_k"] if gated is True else _another_divisor(fields["tokens"] * fields["top_k"], fields["top_k"])
        )
        fields.setdefault("gate_slots", slots)
    covers = tuple((dimension, each.name) for dimension, each in classes.items())
    return Case(name, **fields, call=Call(**how), covers=covers)


def _another_divisor(rows: int, slots: int) -> int:
    """Gates a token, more than one and not as many as it has slots, where the rows can be divided so."""
    return next((g for g in range(2, rows + 1) if rows % g == 0 and g != slots), 1)
