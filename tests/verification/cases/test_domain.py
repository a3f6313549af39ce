"""The domain is covered: what a suite leaves out is counted, not believed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations, product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from judging import BY_NAME

from mxref.scattermoe import RoundingPoints, backward, forward
from mxref.verification.candidates.shipped import golden
from mxref.verification.cases.call import Call, Layout, lay_out
from mxref.verification.cases.case import Case
from mxref.verification.cases.covering import combinations_of, covering_array, legal_pairs
from mxref.verification.cases.domain import DIMENSIONS, Class, Dimension, dimensions_for
from mxref.verification.cases.domain_cases import domain_cases, slots_of, without_costly, without_hiding
from mxref.verification.cases.draw import draw
from mxref.verification.cases.exclusions import EXCLUDED, Exclusion
from mxref.verification.cases.scope import Scope
from mxref.verification.cases.subset import parse_subset
from mxref.verification.cases.suites import behaviour_cases, exact_cases, ordinary_cases

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


@pytest.mark.parametrize(
    "layout",
    [
        "contiguous", "transposed", "sliced", "padded", "offset", "apart", "innermost", "overlapping", "expanded",
        "one column", "one number",
    ],
)  # fmt: skip
@pytest.mark.parametrize("before", [0, 64])
def test_layouts_hold_the_same_values_in_other_places(layout: Layout, before: int) -> None:
    alike = {
        "expanded": torch.arange(4.0).expand(3, 4), "one column": torch.arange(3.0)[:, None].expand(3, 4),
        "one number": torch.tensor(2.0).expand(3, 4), "overlapping": torch.arange(8.0).unfold(0, 4, 2),
    }  # fmt: skip
    x = alike.get(layout, torch.arange(12.0).view(3, 4)).contiguous()
    laid = lay_out(x, layout, before)
    assert torch.equal(laid, x)
    assert laid.data_ptr() != x.data_ptr()
    if layout not in ("transposed", "padded"):
        behind = laid.storage_offset() - before
        assert behind in (13, 8, 4, 2, 16) if layout == "offset" else behind == (4 if layout == "apart" else 0)
    found = {
        "contiguous": laid.is_contiguous(),
        "transposed": laid.stride() in ((1, 3), (1, 10), (1, 16)),
        "innermost": laid.stride() == (1, 3),
        "sliced": laid.stride() in ((8, 2), (21, 3)),
        "padded": laid.stride() in ((9, 1), (16, 1)),
        "one column": laid.stride() == (1, 0),
        "one number": laid.stride() == (0, 0),
        "offset": laid.is_contiguous(),
        "apart": laid.stride() == (8, 1),
        "overlapping": laid.stride() == (2, 1),
        "expanded": laid.stride() == (0, 1),
    }
    assert found[layout]


def test_a_layout_is_had_in_each_of_its_ways() -> None:
    """As fused projections lie: either half, with wide rows; and with neither rows nor columns close together."""
    ways: dict[Layout, Callable[[int], list[tuple[int, ...]]]] = {
        "transposed": lambda r: [
            (5 * r, 1, r, 0),
            (10 * r, 1, r, 5 * r),
            (5 * (r + 7), 1, r + 7, 0),
            (5 * (r // 16 + 1) * 16, 1, (r // 16 + 1) * 16, 0),
        ],
        "sliced": lambda r: [(10 * r, 10, 2, 0), (24 * r, 24, 3, 0)],
        "padded": lambda r: [(10 * r, 10, 1, 0), (16 * r, 16, 1, 0), (16 * r, 16, 1, 11), (20 * r, 20, 1, 0)],
    }
    for layout, expected in ways.items():
        laid = {rows: lay_out(torch.zeros(2, rows, 5), layout) for rows in range(3, 60) if rows % 16 != 9}
        found = {expected(rows).index((*x.stride(), x.storage_offset())) for rows, x in laid.items()}
        assert found == {*range(len(expected(3)))}


def test_where_a_buffer_is_entered_varies_and_so_does_its_alignment() -> None:
    found = {lay_out(torch.zeros(rows, dtype=torch.uint8), "offset").storage_offset() for rows in range(1, 60)}
    assert found == {13, 8, 4, 2, 16}


def test_gates_lie_as_one_column_or_as_one_row() -> None:
    gates = torch.ones(3, 4)
    assert Call(gates="expanded").lay_out("gates", gates).stride() == (1, 0)
    assert Call(gates="one row").lay_out("gates", gates).stride() == (0, 1)


def test_each_index_tensor_lies_by_itself_and_shares_memory_only_where_it_is_the_same_everywhere() -> None:
    call = Call(ids="expanded", rows="sliced")
    same, ascending = torch.full((4,), 3), torch.arange(4)
    assert call.lay_out("sorted_expert_idxs", same).stride() == (0,)
    assert call.lay_out("sorted_expert_idxs", ascending).is_contiguous()
    assert call.lay_out("sorted_scattered_idxs", ascending).stride() in ((2,), (3,))
    assert call.lay_out("expert_offsets", ascending).is_contiguous()
    assert Call(ends="expanded").lay_out("expert_offsets", same).stride() == (0,)


def test_a_call_can_be_made_where_tensors_have_no_memory_by_default() -> None:
    with Call(default_device="meta").in_both_passes():
        assert torch.zeros(1).is_meta
    assert not torch.zeros(1).is_meta


def test_gates_that_do_not_fit_the_slots() -> None:
    assert slots_of("other", rows=36, slots=4) == 2
    assert slots_of("across", rows=36, slots=4) == 3
    assert slots_of("across", rows=9, slots=1) == 3  # nothing goes across one slot
    assert slots_of("all", rows=36, slots=4) == 36


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
    names = ["blocks and no whole tile", "32", "eight or sixteen times an odd number", "whole tiles", "5760"]
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


def has(case: Case, fields: Mapping[str, Any]) -> bool:
    """Whether these are a case's fields; so many routed rows are at least that many, by whole tokens."""
    if "rows" in fields:
        return case.tokens == -(-fields["rows"] // case.top_k)
    return vars(case).items() >= fields.items()


@pytest.mark.parametrize("scope", ["cpu, interpreted", "cpu", "cuda"])
def test_a_class_of_several_numbers_has_each_of_them_in_the_quick_suite(scope: str) -> None:
    """So that no remainder of a division by a tile is asked for once only, beside whatever else there happens to be."""
    device, _, interpreted = scope.partition(", ")
    asked = Scope("quick", device, 0, bool(interpreted))
    cases = domain_cases(2, asked.dtypes, asked.expense, 0)
    for dimension in dimensions_for(asked.dtypes, asked.expense):
        for each in dimension.classes:
            own = [case for case in cases if (dimension.name, each.name) in case.covers]
            wanted = [turn.case for turn in each.turns if len(each.turns) > 1]
            lost = [fields for fields in wanted if not any(has(case, fields) for case in own)]
            assert len(lost) <= (dimension.name == "rank"), "a rank may meet a case without adapters, in its turn"


def test_of_a_class_that_is_covered_in_part_only_such_numbers_are_asked() -> None:
    subset = parse_subset("rank>=16, N%32")
    cases = domain_cases(2, FP32, "cheap", 0, subset.within)
    ranks = {case.rank for case in cases}
    assert {20, 44, 18, 34, 40, 48} <= ranks == ranks - set(range(1, 16))
    assert {case.N % 32 for case in cases} == {0}
