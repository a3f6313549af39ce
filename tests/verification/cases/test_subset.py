"""Subsets of the domain, as a candidate declares them."""

from __future__ import annotations

import pytest
import torch
from judging import BY_NAME

from mxref.verification.cases.case import Case
from mxref.verification.cases.domain import DIMENSIONS
from mxref.verification.cases.domain_cases import domain_cases
from mxref.verification.cases.draw import draw
from mxref.verification.cases.scope import Scope
from mxref.verification.cases.subset import parse_subset
from mxref.verification.cases.suites import behaviour_cases, exact_cases, ordinary_cases


def test_a_subset_is_read_in_the_domain_s_words() -> None:
    subset = parse_subset("forward, gates=none, rank>=16, routing=uniform|empty experts")
    assert str(subset) == "forward, gates=none, rank>=16, routing=uniform|empty experts"
    assert subset.holds(Case("", rank=16))
    assert not subset.holds(Case("", rank=8))
    assert not subset.holds(Case("", rank=16, gate_slots=2))
    assert not subset.holds(Case("", rank=16, routing="sentinels"))
    assert subset.of(Case("")).call.needs == ()
    scope = Scope("quick", "cpu", 0, True, subset)
    asked = [case for case in exact_cases(scope) + ordinary_cases(scope) if case.covers]
    assert asked
    assert {dict(case.covers)["gates"] for case in asked} == {"none"}
    assert {dict(case.covers)["routing"] for case in asked} == {"uniform", "empty experts"}
    assert min(case.rank for case in asked) >= 16


def test_classes_whose_names_hold_commas_can_be_covered() -> None:
    text = "weights=dense|dense, off every grid, N%8, adapters=B zero, NaN in A|none, gates=none"
    subset = parse_subset(text)
    assert str(subset) == text
    kept = {each.name: [one.name for one in each.classes] for each in subset.within(list(DIMENSIONS))}
    assert (kept["weights"], kept["adapters"]) == (["dense", "dense, off every grid"], ["none", "B zero, NaN in A"])
    names = ["blocks and no whole tile", "32", "eight or sixteen times an odd number", "whole tiles", "long"]
    assert (kept["N"], kept["gates"]) == (names, ["none"])


@pytest.mark.parametrize(
    "covers",
    [
        "weights=dense, dtype=bf16, adapters=ordinary|B zero",
        "weights=packed, adapters=none, biases=none, gates=none, routing=uniform, layout of x=padded",
        "rank>=16, output order=by expert, gates=none, slots=one",
        "gates=positive|one a row, N%64",
    ],
)
def test_what_holds_a_candidate_against_itself_is_fitted_to_what_it_covers(covers: str) -> None:
    """So that determinism, memory and order of calls are asked of whoever covers a part; exact fixtures stay exact."""
    scope = Scope("quick", "cpu", 0, False, parse_subset(covers))
    everything = Scope("quick", "cpu", 0, False)
    for name in ("poison", "determinism", "sequences", "subsets"):
        cases = list(BY_NAME[name].cases(scope))
        assert len(cases) == len(list(BY_NAME[name].cases(everything)))
        for case in cases:
            assert isinstance(case, Case)
            assert scope.subset.holds(case), case
            assert case.exact is (name in ("sequences", "subsets"))
            draw(case)
    assert list(BY_NAME["poison"].cases(everything)) == behaviour_cases("quick", "cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gate=none", "'gate' is no dimension"),
        ("gates=some", "'some' is no class of gates"),
        ("gates>=2", "compares no number"),
        ("everything", "is no condition"),
    ],
)
def test_a_subset_that_is_not_understood_says_why(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_subset(text)


def test_of_a_class_that_is_covered_in_part_only_such_numbers_are_asked() -> None:
    subset = parse_subset("rank>=16, N%32")
    cases = domain_cases(2, (torch.float32,), "cheap", 0, subset.within)
    ranks = {case.rank for case in cases}
    assert {20, 44, 18, 34, 40, 48} <= ranks == ranks - set(range(1, 16))
    assert {case.N % 32 for case in cases} == {0}
