"""The domain is covered: what a suite leaves out is counted, not believed."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations, product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mxref.scattermoe import RoundingPoints, backward, forward
from mxref.verification.candidates.shipped import golden
from mxref.verification.cases.case import Case
from mxref.verification.cases.covering import combinations_of, covering_array, legal_pairs
from mxref.verification.cases.domain import DIMENSIONS, Class, Dimension, dimensions_for
from mxref.verification.cases.domain_cases import domain_cases, slots_of, without_costly, without_hiding
from mxref.verification.cases.draw import draw
from mxref.verification.cases.exclusions import EXCLUDED, Exclusion
from mxref.verification.cases.scope import Scope
from mxref.verification.cases.subset import parse_subset
from mxref.verification.cases.suites import exact_cases, ordinary_cases

FP32 = (torch.float32,)
EVERY = (torch.float32, torch.bfloat16, torch.float16)


def numbers(dimensions: list[Dimension]) -> dict[tuple[str, str], int]:
    """(dimension, class), numbered through."""
    return {(d.name, each.name): n for n, (d, each) in enumerate((d, c) for d in dimensions for c in d.classes)}


def covered(cases: list[Case], dimensions: list[Dimension], strength: int) -> npt.NDArray[np.bool_]:
    """Which combinations of ascending class numbers occur in some case."""
    number = numbers(dimensions)
    rows = np.sort([[number[chosen] for chosen in case.covers] for case in cases], axis=1)
    found = np.zeros((len(number),) * strength, dtype=bool)
    for columns in combinations(rows.T, strength):
        found[columns] = True
    return found


def legal(dimensions: list[Dimension], strength: int) -> npt.NDArray[np.bool_]:
    """Which combinations of ascending class numbers the exclusions leave, counted without the generator."""
    number = numbers(dimensions)
    of = np.array([place for place, d in enumerate(dimensions) for _ in d.classes])
    pairs = of[:, None] < of
    for excluded in EXCLUDED:
        for a, b in product(excluded.classes, excluded.others):
            one, other = number.get((excluded.first, a)), number.get((excluded.second, b))
            if one is not None and other is not None:
                pairs[min(one, other), max(one, other)] = False
    return pairs if strength == 2 else pairs[:, :, None] & pairs[:, None, :] & pairs[None]


def named(dimensions: list[Dimension], combination: npt.NDArray[np.int64]) -> list[tuple[str, str]]:
    """The classes of a combination, for a message."""
    every = [*numbers(dimensions)]
    return [every[n] for n in combination]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("scope", ["cpu, interpreted", "cpu", "cuda"])
def test_every_legal_pair_of_classes_is_asked_in_the_quick_suite(scope: str, seed: int) -> None:
    device, _, interpreted = scope.partition(", ")
    asked = Scope("quick", device, seed, bool(interpreted))
    cases = [case for case in exact_cases(asked) + ordinary_cases(asked) if case.covers]
    dimensions = dimensions_for(asked.dtypes, asked.expense)
    wanted = legal(dimensions, 2)
    assert wanted.sum() > 5000
    missing = np.argwhere(wanted & ~covered(cases, dimensions, 2))
    assert not len(missing), [named(dimensions, pair) for pair in missing[:5]]
    assert len({case.name for case in cases}) == len(cases)
    telling = without_hiding(dimensions)
    showing = [case for case in cases if set(case.covers) <= numbers(telling).keys()]
    unseen = np.argwhere(legal(telling, 2) & ~covered(showing, telling, 2))
    assert not len(unseen), [named(telling, pair) for pair in unseen[:5]]


def test_classes_that_hide_the_others_leave_nothing_but_zeros() -> None:
    """Whatever else is varied: no row has a result that is not zero."""
    every, telling = (numbers(of(dimensions_for(FP32, "interpreted"))).keys() for of in (list, without_hiding))
    hiding = every - telling
    assert hiding == {("rows", "none"), ("routing", "all sentinels")}
    cases = [case for case in domain_cases(2, FP32, "interpreted", 0) if not hiding.isdisjoint(case.covers)]
    assert cases
    for case in cases:
        for x in golden().run(draw(case)).values():
            assert x is None or not x.any()


def test_every_legal_triple_that_a_whole_call_can_hold_is_asked_in_the_full_suite() -> None:
    """What is missing is impossible together with some dimension's every class, whatever else is chosen."""
    every = dimensions_for(FP32, "any")
    dimensions = without_hiding(without_costly(every))
    wanted = legal(dimensions, 3)
    assert wanted.sum() > 500_000
    cases = domain_cases(3, FP32, "any", 0)
    cheap = [case for case in cases if set(case.covers) <= numbers(dimensions).keys()]
    missing = np.argwhere(wanted & ~covered(cheap, dimensions, 3))
    pairs, of = legal(dimensions, 2), [place for place, d in enumerate(dimensions) for _ in d.classes]

    def dead(triple: npt.NDArray[np.int64]) -> bool:
        together = (pairs | pairs.T)[triple].all(0)
        held = {of[n] for n in triple}
        left = {of[n] for n in np.flatnonzero(together)} | held
        return len(left) < len(dimensions)

    alive = [named(dimensions, triple) for triple in missing if not dead(triple)]
    assert not alive, alive[:5]
    assert not (legal(every, 2) & ~covered(cases, every, 2)).any(), "costly and hiding classes occur in every pair"


def test_what_is_costly_is_the_largest_batch_alone() -> None:
    """The full suite of a GPU and of plain PyTorch has every triple of all other classes."""
    every, cheap = dimensions_for(EVERY, "any"), without_costly(dimensions_for(EVERY, "any"))
    assert numbers(every).keys() - numbers(cheap).keys() == {("rows", "more than 2^16")}
    assert without_costly(dimensions_for(EVERY, "interpreted")) == dimensions_for(EVERY, "interpreted")
    largest = [parse_subset("rows=more than 2^16").within(every)[0]]
    assert without_costly(largest) == largest, "nothing else is left"


def test_of_classes_that_cover_as_much_the_cheapest_is_taken() -> None:
    others = [Dimension(name, tuple(map(Class, "012"))) for name in "bcde"]
    cheap, dear = (
        sum(row[0] == 1 for row in covering_array([Dimension("a", (Class("0"), each)), *others], (), 2, 0))
        for each in (Class("1"), Class("1", cost=1.0))
    )
    assert 3 <= dear < cheap
    cases = domain_cases(2, EVERY, "cheap", 0)
    assert sum(("experts", "hundreds") in case.covers for case in cases) < len(cases) / 4


def test_another_seed_covers_with_other_cases() -> None:
    one, other = (domain_cases(2, FP32, "interpreted", seed) for seed in (0, 1))
    assert {case.covers for case in one}.isdisjoint(case.covers for case in other)


def test_exclusions_name_classes_that_there_are() -> None:
    classes = {dimension.name: {each.name for each in dimension.classes} for dimension in DIMENSIONS}
    for excluded in EXCLUDED:
        assert set(excluded.classes) <= classes[excluded.first], excluded
        assert set(excluded.others) <= classes[excluded.second], excluded
        assert excluded.why


def test_the_generator_knows_what_it_leaves_out() -> None:
    """Two dimensions that exclude each other through a third: the pair is no whole row, and no error."""
    a, b, c = (Dimension(name, (Class("0"), Class("1"))) for name in "abc")
    excluded = (Exclusion("a", ("0",), "c", ("0",), ""), Exclusion("b", ("0",), "c", ("1",), ""))
    rows = covering_array([a, b, c], excluded, 2, 0)
    pairs = set(map(tuple, combinations_of(legal_pairs([a, b, c], excluded), [2, 2, 2], 2).tolist()))
    told = {tuple(2 * place + value for place, value in enumerate(row)) for row in rows}
    assert pairs - {pair for row in told for pair in combinations(row, 2)} == {(0, 2)}


@pytest.mark.parametrize("dtypes", [FP32, EVERY], ids=["fp32", "every dtype"])
def test_a_drawn_call_is_what_its_classes_say(dtypes: tuple[torch.dtype, ...]) -> None:
    for case in domain_cases(2, dtypes, "cheap", 3)[::5]:
        sample, classes = draw(case), dict(case.covers)
        problem = sample.problem
        assert (problem.gates is None) == (classes["gates"] == "none")
        assert (problem.lora_A is None) == (classes["adapters"] == "none")
        dtypes = problem.sorted_expert_idxs.dtype, problem.sorted_scattered_idxs.dtype, problem.expert_offsets.dtype
        names = ("ids", "positions", "offsets")
        ids, _, others = classes["indices"].partition(", ")
        different = names[1:] if others.startswith("others") else [n for n in names if others.startswith(n)]
        assert dtypes == tuple(getattr(torch, others[-5:] if n in different else ids) for n in names), case
        if problem.gates is not None and problem.P > 2 and not bool(problem.gates.isnan().any()):
            signs = {"negative": (True, False), "some zero": (False, True)}.get(classes["gates"], (False, False))
            gates = problem.gates
            assert (bool((gates < 0).any()), bool((gates == 0).any())) == signs, case
            others = [g for g in range(2, problem.P + 1) if problem.P % g == 0 and g != case.top_k]
            across = [g for g in others if g % case.top_k and case.top_k % g]
            expected = {
                "another number a token": others or [1],
                "across tokens": across or others or [1],
                "all a token's": [problem.P],
                "one a row": [1],
            }
            assert gates.shape[1] in expected.get(classes["gates"], [case.top_k]), case
        if classes["fan out"] == "a row a slot":
            assert problem.k == 1
        if problem.lora_A is not None and problem.lora_A.numel() and problem.lora_B is not None:
            nan = bool(problem.lora_A.isnan().any()), bool(problem.lora_B.isnan().any())
            assert nan == ("NaN in A" in classes["adapters"], "NaN in B" in classes["adapters"]), case
        layouts = {
            "expert ids": "sorted_expert_idxs",
            "positions": "sorted_scattered_idxs",
            "offsets": "expert_offsets",
        }
        assert all(case.call.layout(name) == classes[f"layout of {words}"] for words, name in layouts.items())
        if classes["routing"] == "all sentinels":
            assert bool((problem.sorted_expert_idxs >= problem.E).all())
        if "sentinels" in classes["routing"]:
            assert bool((problem.sorted_expert_idxs >= problem.E).any()) == (problem.P > 0), case
        if classes["routing"] == "sentinels far above" and problem.P:
            assert int(problem.sorted_expert_idxs.max()) == torch.iinfo(problem.sorted_expert_idxs.dtype).max
        if case.special in ("nan row", "inf row"):
            assert int((~problem.inputs.isfinite()).any(1).sum()) == 1 + (len(problem.inputs) > 1)
        if "B zero" in classes["adapters"] and problem.lora_B is not None:
            assert not bool(problem.lora_B.any())
        for name, x in problem.arguments().items():
            if isinstance(x, torch.Tensor):
                assert torch.equal(case.call.lay_out(name, x).nan_to_num(), x.nan_to_num()), (case, name)
        assert torch.equal(case.call.lay_out("grad_out", sample.grad_out).nan_to_num(), sample.grad_out.nan_to_num())


def test_a_rounding_to_infinity_is_drawn() -> None:
    """Z and V of fp16: some of their integers are finite, and others are not."""
    for kind, point in (("Z overflows", "z"), ("V overflows", "v")):
        case = Case("", 2, 64, 64, 20, 2, 4, torch.float16, data="integer", adapter_values=kind)
        sample = draw(case)
        points = RoundingPoints.contract(torch.float16)
        fwd = forward(sample.problem, points)
        rounded = getattr(fwd if point == "z" else backward(sample.problem, fwd, sample.grad_out, points), point)
        assert rounded.exact.isfinite().all()
        assert rounded.value.isinf().any()
        assert (rounded.value.isfinite() & (rounded.value != 0)).any()


def test_gates_that_do_not_fit_the_slots() -> None:
    assert slots_of("other", rows=36, slots=4) == 2
    assert slots_of("across", rows=36, slots=4) == 3
    assert slots_of("across", rows=9, slots=1) == 3  # nothing goes across one slot
    assert slots_of("all", rows=36, slots=4) == 36


def has(case: Case, fields: Mapping[str, Any]) -> bool:
    """Whether these are a case's fields; so many routed rows are at least that many, by whole tokens."""
    if "rows" in fields:
        return case.tokens == -(-fields["rows"] // case.top_k)
    return {**vars(case), **vars(case.call)}.items() >= fields.items()


@pytest.mark.parametrize("scope", ["cpu, interpreted", "cpu", "cuda"])
def test_a_class_of_several_numbers_has_each_of_them_in_the_quick_suite(scope: str) -> None:
    """So that no remainder of a division by a tile is asked for once only, beside whatever else there happens to be."""
    device, _, interpreted = scope.partition(", ")
    asked = Scope("quick", device, 0, bool(interpreted))
    cases = domain_cases(2, asked.dtypes, asked.expense, 0)
    for dimension in dimensions_for(asked.dtypes, asked.expense):
        for each in dimension.classes:
            own = [case for case in cases if (dimension.name, each.name) in case.covers]
            wanted = [turn.own for turn in each.turns if len(each.turns) > 1]
            lost = [fields for fields in wanted if not any(has(case, fields) for case in own)]
            assert len(lost) <= (dimension.name == "rank"), "a rank may meet a case without adapters, in its turn"
