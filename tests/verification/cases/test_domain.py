"""The domain is covered: what a suite leaves out is counted, not believed."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from judging import BY_NAME

from mxref.scattermoe import RoundingPoints, backward, forward
from mxref.verification.cases.call import lay_out
from mxref.verification.cases.case import Case
from mxref.verification.cases.covering import combinations_of, covering_array, legal_pairs
from mxref.verification.cases.domain import DIMENSIONS, Class, Dimension, dimensions_for
from mxref.verification.cases.domain_cases import domain_cases
from mxref.verification.cases.draw import draw
from mxref.verification.cases.exclusions import EXCLUDED, Exclusion
from mxref.verification.cases.scope import Scope
from mxref.verification.cases.subset import parse_subset
from mxref.verification.cases.suites import behaviour_cases, exact_cases, ordinary_cases

FP32 = (torch.float32,)
EVERY = (torch.float32, torch.bfloat16, torch.float16)


def covered(cases: list[Case], strength: int) -> set[tuple[tuple[str, str], ...]]:
    """Combinations of (dimension, class) that occur in some case."""
    return {chosen for case in cases for chosen in combinations(case.covers, strength)}


def legal(dimensions: list[Dimension], strength: int) -> set[tuple[tuple[str, str], ...]]:
    """Combinations of (dimension, class) that the exclusions leave, counted without the generator."""
    forbidden = {
        frozenset(((e.first, a), (e.second, b))) for e in EXCLUDED for a in e.classes for b in e.others
    }  # fmt: skip
    found = set()
    for chosen in combinations(dimensions, strength):
        rows: list[tuple[tuple[str, str], ...]] = [()]
        for dimension in chosen:
            rows = [(*row, (dimension.name, each.name)) for row in rows for each in dimension.classes]
        found |= {row for row in rows if not any(frozenset(pair) in forbidden for pair in combinations(row, 2))}
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("scope", ["cpu, interpreted", "cpu", "cuda"])
def test_every_legal_pair_of_classes_is_asked_in_the_quick_suite(scope: str, seed: int) -> None:
    device, _, interpreted = scope.partition(", ")
    asked = Scope("quick", device, seed, bool(interpreted))
    cases = [case for case in exact_cases(asked) + ordinary_cases(asked) if case.covers]
    missing = legal(dimensions_for(asked.dtypes, asked.expense), 2) - covered(cases, 2)
    assert not missing, sorted(missing)[:5]
    assert len({case.name for case in cases}) == len(cases)


def test_every_legal_triple_that_a_whole_call_can_hold_is_asked_in_the_full_suite() -> None:
    """What is missing is impossible together with some dimension's every class, whatever else is chosen."""
    dimensions = dimensions_for(FP32, "interpreted")
    missing = legal(dimensions, 3) - covered(domain_cases(3, FP32, "interpreted", 0), 3)
    pairs = legal(dimensions, 2)

    def dead(row: tuple[tuple[str, str], ...]) -> bool:
        return any(
            not any(
                all(tuple(sorted((own, (d.name, c.name)), key=lambda p: order[p[0]])) in pairs for own in row)
                for c in d.classes
            )
            for d in dimensions
            if d.name not in {name for name, _ in row}
        )

    order = {dimension.name: i for i, dimension in enumerate(dimensions)}
    assert all(dead(row) for row in missing), [row for row in missing if not dead(row)][:5]


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
        int32s = {"int32": 3, "int32, offsets int64": 2, "int64, others int32": 2}.get(classes["indices"], 0)
        assert dtypes.count(torch.int32) == int32s
        assert (dtypes[0] == torch.int32) == classes["indices"].startswith("int32")
        if problem.gates is not None and problem.P > 2 and not bool(problem.gates.isnan().any()):
            signs = {"negative": (True, False), "some zero": (False, True)}.get(classes["gates"], (False, False))
            gates = problem.gates
            assert (bool((gates < 0).any()), bool((gates == 0).any())) == signs, case
            if classes["gates"] == "another number a token":
                others = [g for g in range(2, problem.P + 1) if problem.P % g == 0 and g != case.top_k]
                assert gates.shape[1] in (others or [1]), case
            else:
                assert gates.shape[1] == (1 if classes["gates"] == "one a row" else case.top_k)
        if classes["fan out"] == "a row a slot":
            assert problem.k == 1
        if problem.lora_A is not None and problem.lora_A.numel() and problem.lora_B is not None:
            nan = bool(problem.lora_A.isnan().any()), bool(problem.lora_B.isnan().any())
            assert nan == ("NaN in A" in classes["adapters"], "NaN in B" in classes["adapters"]), case
        call = case.call
        assert call.layout("sorted_expert_idxs") == call.layout("expert_offsets") == classes["layout of indices"]
        if classes["routing"] == "all sentinels":
            assert bool((problem.sorted_expert_idxs >= problem.E).all())
        if classes["routing"] == "sentinels far above" and bool((problem.sorted_expert_idxs >= problem.E).any()):
            assert int(problem.sorted_expert_idxs.max()) == torch.iinfo(problem.sorted_expert_idxs.dtype).max
        if case.special in ("nan row", "inf row"):
            assert int((~problem.inputs.isfinite()).any(1).sum()) == 1
        if "B zero" in classes["adapters"] and problem.lora_B is not None:
            assert not bool(problem.lora_B.any())
        for name, x in problem.arguments().items():
            if isinstance(x, torch.Tensor):
                assert torch.equal(lay_out(x, case.call.layout(name)).nan_to_num(), x.nan_to_num()), (case, name)
        assert torch.equal(lay_out(sample.grad_out, case.call.dOut).nan_to_num(), sample.grad_out.nan_to_num()), case


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
    ["contiguous", "transposed", "sliced", "padded", "offset", "apart", "expanded", "one column", "one number"],
)
def test_layouts_hold_the_same_values_in_other_places(layout: str) -> None:
    alike = {"expanded": torch.arange(4.0), "one column": torch.arange(3.0)[:, None], "one number": torch.tensor(2.0)}
    x = alike[layout].expand(3, 4) if layout in alike else torch.arange(12.0).view(3, 4)
    laid = lay_out(x, layout)
    assert torch.equal(laid, x)
    assert laid.data_ptr() != x.data_ptr()
    found = {
        "contiguous": laid.is_contiguous() and laid.storage_offset() == 0,
        "transposed": laid.stride() == (1, 3),
        "sliced": laid.stride() == (8, 2),
        "padded": laid.stride() == (9, 1),
        "one column": laid.stride() == (1, 0),
        "one number": laid.stride() == (0, 0),
        "offset": laid.is_contiguous() and laid.storage_offset() == 13,
        "apart": laid.stride() == (8, 1) and laid.storage_offset() == 4,
        "expanded": laid.stride() == (0, 1),
    }
    assert found[layout]


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
    text = "weights=dense|dense, sliced, N%8, adapters=B zero, NaN in A|none, gates=none"
    subset = parse_subset(text)
    assert str(subset) == text
    kept = {each.name: [one.name for one in each.classes] for each in subset.within(list(DIMENSIONS))}
    assert (kept["weights"], kept["adapters"]) == (["dense", "dense, sliced"], ["none", "B zero, NaN in A"])
    assert (kept["N"], kept["gates"]) == (["96", "5760"], ["none"])


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
