"""A subset of the domain that a candidate declares to cover, in the domain's own words.

forward                no gradients
one backward           no second backward pass over a retained graph, as in what torch.compile makes
gates=none             one class, or several: routing=uniform|empty experts
rank>=16               a number: rows, experts, K, N, rank or slots; also <=, = and a|b
N%8                    a multiple of a number
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from mxref.verification.cases.call import Call
from mxref.verification.cases.case import Case
from mxref.verification.cases.domain import DIMENSIONS, Class, Dimension
from mxref.verification.cases.domain_cases import dtypes_apart, slots_of

_NO_FIELDS = ("data", "gated", "rows", "apart")
"""What a class says of a case that is none of its fields, or not to be changed."""

_NUMBERS: dict[str, Callable[[Case], int]] = {
    "rows": lambda case: case.rows,
    "experts": lambda case: case.experts,
    "K": lambda case: case.K,
    "N": lambda case: case.N,
    "rank": lambda case: case.rank,
    "slots": lambda case: case.top_k,
}

_FORM = re.compile(r"\s*([\w ]+?)\s*(>=|<=|=|%)\s*(.+?)\s*")


@dataclass(frozen=True)
class Condition:
    """One dimension held to some classes, or to some numbers.

    Attributes:
        dimension: its name.
        relation: "=", ">=", "<=" or "%", a multiple of.
        values: class names, or numbers as text.
    """

    dimension: str
    relation: str
    values: tuple[str, ...]

    def holds(self, case: Case) -> bool:
        """Whether a case lies within."""
        if self.dimension in _NUMBERS and all(value.isdigit() for value in self.values):
            number, bounds = _NUMBERS[self.dimension](case), [int(value) for value in self.values]
            return {
                "=": number in bounds,
                ">=": number >= bounds[0],
                "<=": number <= bounds[0],
                "%": number % max(bounds[0], 1) == 0,
            }[self.relation]
        covered = dict(case.covers).get(self.dimension)
        return (covered or _class_of(case, self.dimension)) in self.values

    def __str__(self) -> str:
        return f"{self.dimension}{self.relation}{'|'.join(self.values)}"


@dataclass(frozen=True)
class Subset:
    """Conditions that all hold; `forward`: gradients are not covered; `one_backward`: nor are two over one graph."""

    conditions: tuple[Condition, ...] = ()
    forward: bool = False
    one_backward: bool = False

    def __bool__(self) -> bool:
        return bool(self.conditions) or self.forward or self.one_backward

    def __str__(self) -> str:
        words = {"forward": self.forward, "one backward": self.one_backward}
        return ", ".join([*(word for word, said in words.items() if said), *map(str, self.conditions)])

    def holds(self, case: Case) -> bool:
        """Whether a case lies within."""
        return all(condition.holds(case) for condition in self.conditions)

    def of(self, case: Case) -> Case:
        """The case without what is not covered of every case."""
        return replace(case, call=replace(case.call, needs=())) if self.forward else case

    def fitted(self, case: Case) -> Case:
        """A case that is there to hold a candidate against itself, so that it lies within where it can."""
        for condition in self.conditions:
            case = case if condition.holds(case) else _moved(case, condition)
        return case

    def within(self, dimensions: list[Dimension]) -> list[Dimension]:
        """The dimensions with the classes that some case within can have."""
        kept = []
        for dimension in dimensions:
            own = [condition for condition in self.conditions if condition.dimension == dimension.name]
            classes = tuple(
                each.of([turn.own for turn in turns])
                for each in dimension.classes
                if (turns := [turn for turn in each.turns if all(_allows(c, dimension, turn) for c in own)])
            )
            if self.one_backward and dimension.name == "backward pass":
                classes = classes[:1]  # the others keep the graph
            kept.append(Dimension(dimension.name, classes))
        return kept


def parse_subset(text: str) -> Subset:
    """`forward,gates=none,rank>=16` as conditions.

    Raises:
        ValueError: a condition is not understood, or names no dimension or class of the domain.
    """
    conditions, words = [], set[str]()
    for part in _parts(text):
        if part in ("forward", "one backward"):
            words.add(part)
            continue
        form = _FORM.fullmatch(part)
        if form is None:
            raise ValueError(
                f"{part!r} is no condition; expected forward, one backward, DIMENSION=CLASS, rank>=16 or N%8"
            )
        condition = Condition(form[1], form[2], tuple(value.strip() for value in form[3].split("|")))
        _check(condition)
        conditions.append(condition)
    return Subset(tuple(conditions), "forward" in words, "one backward" in words)


def _parts(text: str) -> list[str]:
    """What commas separate, but for those within the name of a class, as in «dense, off every grid»."""
    names = {each.name for dimension in DIMENSIONS for each in dimension.classes}
    parts: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        before = re.split(r"[=|]", parts[-1])[-1].strip() if parts else ""
        if f"{before}, {part.partition('|')[0].strip()}" in names:
            parts[-1] += f", {part}"
        else:
            parts.append(part)
    return parts


def _check(condition: Condition) -> None:
    named = {dimension.name: [each.name for each in dimension.classes] for dimension in DIMENSIONS}
    if condition.dimension not in named:
        raise ValueError(f"{condition.dimension!r} is no dimension; choose from {', '.join(named)}")
    numeric = condition.dimension in _NUMBERS and all(value.isdigit() for value in condition.values)
    unknown = [value for value in condition.values if value not in named[condition.dimension]]
    if condition.relation != "=" and not (numeric and len(condition.values) == 1):
        raise ValueError(f"{condition} compares no number; {', '.join(_NUMBERS)} are numbers")
    if not numeric and unknown:
        classes = ", ".join(named[condition.dimension])
        raise ValueError(f"{unknown[0]!r} is no class of {condition.dimension}; choose from {classes}")


def _allows(condition: Condition, dimension: Dimension, each: Class) -> bool:
    """Whether some case of a class of one number can meet a condition on its dimension."""
    if condition.dimension in _NUMBERS and all(value.isdigit() for value in condition.values):
        fields = {key: value for key, value in each.case.items() if key not in ("rows", "apart")}
        if dimension.name == "rows":
            return True  # rows are tokens times slots: judged case by case
        return condition.holds(Case("", **fields))
    return each.name in condition.values


def _moved(case: Case, condition: Condition) -> Case:
    """The case in the first class that meets a condition, and what other classes of its dimension set as by default.

    The kind of numbers stays: a fixture whose sums are exact is one afterwards.
    """
    dimension = next(each for each in DIMENSIONS if each.name == condition.dimension)
    turns = (turn for each in dimension.classes for turn in each.turns if _allows(condition, dimension, turn))
    chosen = next(turns, dimension.classes[0])

    def changes(kind: type[Case | Call], of: Callable[[Class], Mapping[str, Any]]) -> dict[str, Any]:
        usual = {field.name: field.default for field in fields(kind) if field.default is not MISSING}
        others = {name: usual[name] for each in dimension.classes for name in of(each) if name in usual}
        return {name: x for name, x in (others | {**of(chosen)}).items() if name not in _NO_FIELDS}

    call = replace(case.call, **changes(Call, lambda each: each.call))
    moved = replace(case, **changes(Case, lambda each: each.case), call=call)
    if dimension.name == "parameters":
        apart = chosen.case.get("apart")
        moved = replace(moved, own_dtypes=() if apart is None else dtypes_apart(apart, moved.dtype))
    if chosen.case.get("gated"):
        return replace(moved, gate_slots=moved.top_k, grouped_out=False)
    gated = moved.gate_slots and not moved.grouped_out  # the gated sum needs rows by position
    return replace(moved, gate_slots=moved.top_k if gated else 0)


def _class_of(case: Case, dimension: str) -> str:
    """The class of a case that was not made from the domain: the one whose fields agree with most of its own."""
    classes = next(each.classes for each in DIMENSIONS if each.name == dimension)

    def agrees(each: Class) -> bool:
        fields = {name: value for name, value in each.case.items() if name == "data" or name not in _NO_FIELDS}
        apart, kind = each.case.get("apart"), each.case.get("gated")
        if apart is not None and case.own_dtypes != dtypes_apart(apart, case.dtype):
            return False
        gated = not kind or case.gate_slots > 0
        if kind in ("across", "all"):
            gated = case.gate_slots == slots_of(kind, case.rows, case.top_k)
        return (
            gated
            and all(getattr(case, name) == value for name, value in fields.items())
            and all(getattr(case.call, name) == value for name, value in each.call.items())
        )

    exact = [each for each in classes if any(map(agrees, each.turns)) and (each.case or each.call)]
    if dimension == "gates" and not case.gate_slots:
        return "none"
    if dimension == "adapters" and not case.rank:
        return "none"
    return (exact or [classes[0]])[-1].name
