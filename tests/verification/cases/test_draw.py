"""Draws: deterministic, valid, and what their case asks for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from judging import integers, quick

from mxref.rounding import round_to
from mxref.scattermoe import RoundingPoints, backward, expert_order_inputs, forward
from mxref.verification.cases.call import Call
from mxref.verification.cases.case import Case, Sample
from mxref.verification.cases.draw import draw, draw_for_weights
from mxref.verification.cases.gauge import Gauge, scale_bytes
from mxref.weights import MXWeights

SUITES = {
    "quick": quick("cpu"), "integer": integers("cpu"),
    "quick, gpu": quick("cuda"), "integer, gpu": integers("cuda"),
}  # fmt: skip


def same(a: Sample, b: Sample) -> bool:
    pairs = [(a.grad_out, b.grad_out)]
    for name, operand in a.problem.arguments().items():
        other = getattr(b.problem, name)
        if isinstance(operand, torch.Tensor):
            pairs.append((operand, other))
        elif isinstance(operand, MXWeights):
            pairs += [(operand.packed, other.packed), (operand.scales, other.scales)]
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("suite", SUITES)
def test_every_case_builds_a_valid_sample(suite: str) -> None:
    for case in SUITES[suite]:
        sample = draw(case, "cpu", 0)
        problem = sample.problem
        problem.validate(check_values=True)
        assert (problem.E, problem.K, problem.N, problem.P, problem.rank) == (
            case.experts, case.K, case.N, case.rows, case.rank
        )  # fmt: skip
        out = forward(problem, RoundingPoints.contract(problem.dtype)).out.value
        assert tuple(out.shape) == tuple(sample.grad_out.shape) == case.output_shape
        assert sample.grad_out.dtype == problem.dtype == case.dtype
        if case.dtype == torch.float32:  # judged on a CPU, where values stay on the bf16 grid
            for x in (problem.inputs, sample.grad_out):
                assert torch.equal(round_to(x.double(), torch.bfloat16), x.double())


@pytest.mark.parametrize("name", ["block down", "wide scales", "sentinels"])
def test_a_draw_depends_on_case_and_seed_alone(name: str) -> None:
    case = next(c for c in quick("cpu") if c.name == name)
    assert same(draw(case, "cpu", 3), draw(case, "cpu", 3))
    assert not same(draw(case, "cpu", 3), draw(case, "cpu", 4))
    assert not same(draw(case, "cpu", 3), draw(replace(case, name="another"), "cpu", 3))


def test_routings_do_what_they_say() -> None:
    counts = {
        case.name: torch.diff(draw(case).problem.expert_offsets, prepend=torch.tensor([0]))
        for case in quick("cpu")
        if case.name in ("empty experts", "one expert")
    }
    assert not counts["empty experts"][[0, 3, 5]].any()
    assert counts["empty experts"].sum() == 48
    assert sorted(counts["one expert"].tolist()) == [0, 0, 0, 40]
    sentinels = draw(next(c for c in quick("cpu") if c.name == "sentinels")).problem
    assert 0 < int((sentinels.sorted_expert_idxs == sentinels.E).sum()) < sentinels.P / 2
    ten = draw(Case("ten", 40, 64, 64, 60, 4, routing="ten_active")).problem
    assert len(ten.segments()) == 10


def named(case: Case) -> list[Sample]:
    """The case by thirty names."""
    return [draw(replace(case, name=str(name))) for name in range(30)]


def test_one_expert_is_the_first_a_middle_or_the_last() -> None:
    case = Case("", 5, tokens=9, routing="one_expert")
    assert {s.problem.segments()[0][0] for s in named(case)} == {0, 2, 4}
    assert {s.problem.segments()[0][0] for s in named(replace(case, call=Call(ends="expanded")))} == {0}


def test_sentinels_are_few_or_most_or_in_one_half_or_beside_an_empty_first_expert() -> None:
    problems = [s.problem for s in named(Case("", 3, tokens=40, routing="sentinels"))]
    away = [p.row_positions()[p.sorted_expert_idxs >= 3] for p in problems]
    assert all(map(len, away))
    assert {1, 79} < {len(each) for each in away}
    assert any(60 <= len(each) < 79 for each in away)
    assert {bool((each < 40).all()) for each in away if len(each) > 1} == {False, True}
    assert {int(p.expert_offsets[0]) == 0 for p in problems} == {False, True}


def test_byte_255_is_in_any_row_and_block() -> None:
    case, found, where = Case("", 5, 128, 96, special="nan expert"), set(), set()
    for sample in named(case):
        weights = sample.problem.expert_weights
        assert isinstance(weights, MXWeights)
        expert, rows, blocks = (weights.scales == 255).nonzero().T.tolist()
        where |= {*expert}
        found |= {("row", *{*rows}), ("blocks", *blocks)}
    assert where == {2, 4}
    assert found == {
        ("row", 0), ("row", 48), ("row", 95), ("blocks", 0), ("blocks", 1), ("blocks", 3), ("blocks", 0, 3)
    }  # fmt: skip


def test_one_expert_s_adapters_and_biases_are_zero_or_all() -> None:
    idle = set()
    for sample in named(Case("", 4, bias=True, adapter_values="zero expert")):
        A, B, biases = sample.problem.lora_A, sample.problem.lora_B, sample.problem.expert_biases
        assert A is not None
        assert B is not None
        assert biases is not None
        zero = [[e for e in range(4) if not x[e].any()] for x in (B.T.view(4, 4, -1), biases, A.view(4, 4, -1))]
        assert zero == [[zero[0][0]], [zero[0][0]], [(zero[0][0] + 1) % 4]]
        idle.add(zero[0][0])
    assert idle == {0, 2, 3}
    both = {bool(s.problem.lora_B.any()) for s in named(Case("", adapter_values="zero A"))}  # type: ignore[union-attr]
    assert both == {False, True}


def test_lora_s_term_matters_beside_a_tiny_scaling() -> None:
    case = Case("", dtype=torch.bfloat16, data="balanced", scaling=2.0**-26)
    ordinary, tiny = (draw(each).problem.lora_B for each in (replace(case, scaling=1.0), case))
    narrow = draw(replace(case, dtype=torch.float16)).problem.lora_B
    assert ordinary is not None
    assert tiny is not None
    assert narrow is not None
    assert torch.equal(tiny, ordinary * 2.0**26)
    assert narrow.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_has_bits_that_careless_rounding_makes_a_number(dtype: torch.dtype) -> None:
    """Among cases each pattern stands alone, in a parameter and in a row."""
    case = Case("", 3, dtype=dtype, adapter_values="nan A", special="nan row")
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    infinity = int(torch.tensor([float("inf")], dtype=dtype).view(bits))
    expected = {torch.iinfo(bits).max, -1, infinity + 1}
    samples = named(case)
    for name in ("lora_A", "inputs"):
        found = [{*x.view(bits)[x.isnan()].tolist()} for s in samples if (x := getattr(s.problem, name)) is not None]
        assert set().union(*(f for f in found if len(f) == 1)) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_boundary_scales_reach_both_ends_and_stay_finite(dtype: torch.dtype) -> None:
    case = Case("boundary", 2, 192, 96, 16, dtype=dtype, data="boundary", bias=True)
    sample = draw(case)
    scales = sample.problem.expert_weights.scales
    assert (int(scales.min()), int(scales.max())) == ((0, 252) if dtype == torch.bfloat16 else (104, 140))
    points = RoundingPoints.contract(dtype)
    fwd = forward(sample.problem, points)
    bwd = backward(sample.problem, fwd, sample.grad_out, points)
    for rounded in (fwd.out, bwd.dx, bwd.dA, bwd.dB, bwd.dbias):
        assert bool(torch.isfinite(rounded.value).all())


def test_balanced_data_makes_both_terms_alike() -> None:
    problem = draw(next(c for c in quick("cpu") if c.name == "balanced")).problem
    x, points = expert_order_inputs(problem), RoundingPoints.exact()
    base = torch.cat([x[a:b] @ problem.expert_weight(e) for e, a, b in problem.segments()])
    low = forward(problem, points).y.exact - base
    assert 0.4 < float(low.norm() / base.norm()) < 2.5


def test_a_gauge_moves_scales_and_nothing_else() -> None:
    gauge = Gauge.from_exponents(torch.tensor([-60, 0, 60]), torch.tensor([60, -60]))
    assert scale_bytes(gauge).tolist() == [[127, 7], [187, 67], [247, 127]]
    assert gauge.u.shape == (64,)


def test_a_sample_around_given_weights() -> None:
    weights = draw(Case("given", 6, 64, 96)).problem.expert_weights
    sample = draw_for_weights(weights, "layer 0", tokens=9, top_k=4, rank=8, bias=True, gate_slots=4)
    assert sample.problem.expert_weights is weights or torch.equal(sample.problem.expert_weights.packed, weights.packed)
    assert tuple(sample.grad_out.shape) == (9, 96)
    assert sample.problem.rank == 8


@pytest.mark.parametrize("parameters", [None, torch.float32])
def test_infinities_stand_beside_nan_in_exact_fixtures(parameters: torch.dtype | None) -> None:
    """Where a parameter is wider than fp16 activations it is finite, and infinite once it is rounded to them."""
    case = Case("", 3, 64, 96, 9, 2, 4, torch.float16, parameters, bias=True, gate_slots=2, data="integer", scaling=0.5)
    case = replace(case, adapter_values="nan A", gate_values="one NaN", nan_bias=True)
    problem, far = draw(case).problem, float("inf") if parameters is None else 2.0**17
    for x, nans in ((problem.lora_A, 3), (problem.gates, 1), (problem.expert_biases, 1)):
        assert x is not None
        assert x.flatten()[[0, -1]].sort().values.tolist() == [-far, far]
        assert int(x.isnan().sum()) == nans
    assert problem.lora_A is not None
    assert problem.lora_A.isnan().any(1).nonzero().flatten().tolist() == [8, 11]  # the last expert's first and last row
    drawn = draw(replace(case, data="balanced")).problem
    assert drawn.lora_A is not None
    assert not drawn.lora_A.isinf().any()


def test_weights_off_the_grid_are_no_mxfp4_weights() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        case = Case("", 3, 64, 96, 9, dtype=dtype, data="balanced", dense=True)
        grid, off = (draw(replace(case, off_grid_weights=each)).problem.expert_weights for each in (False, True))
        assert isinstance(grid, torch.Tensor)
        assert isinstance(off, torch.Tensor)
        there = grid != 0
        assert ((off / grid)[there].double() - 1).abs().max() <= 0.51
        coarser = torch.bfloat16 if dtype != torch.bfloat16 else torch.float8_e5m2
        assert (off != off.to(coarser).to(dtype))[there].double().mean() > 0.5
        assert torch.equal(grid, grid.to(coarser).to(dtype)) or dtype == torch.bfloat16


def test_shuffled_positions_have_their_ends_in_place() -> None:
    case = Case("", 1, 64, 96, 40, position_order="shuffled")
    positions = draw(case).problem.row_positions()
    plain = draw(replace(case, position_order="ascending")).problem.row_positions()
    ends = [0, 15, 16, 31, 64, 79]
    assert torch.equal(positions[ends], plain[ends]), "of every sixteen"
    assert torch.equal(positions.sort().values, plain.sort().values)
    assert not torch.equal(positions, plain)


@pytest.mark.parametrize("special", ["inf row", "inf dOut"])
def test_infinity_meets_a_block_of_zeros(special: str) -> None:
    """Whoever leaves such blocks out has a finite number where 0 · ∞ is NaN."""
    sample = draw(Case("zeros", 2, 64, 32, 9, 1, 0, data="integer", special=special))
    out = forward(sample.problem, RoundingPoints.exact())
    found = (
        out.out.value
        if special == "inf row"
        else backward(sample.problem, out, sample.grad_out, RoundingPoints.exact()).dx.value
    )
    row = found[len(found) // 2]
    assert row[0].isnan()
    assert row[1:].isfinite().any() or row[1:].isinf().any()
