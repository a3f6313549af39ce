"""Cases: deterministic, valid, and covering what they claim; integer fixtures exact in any order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from judging import integers, quick

from mxref.rounding import round_to
from mxref.scattermoe import RoundingPoints, backward, expert_order_inputs, forward
from mxref.verification.cases.case import Case, Sample
from mxref.verification.cases.draw import draw
from mxref.verification.cases.elements import all_elements, finite_bytes, finite_sample, nonfinite_samples
from mxref.verification.cases.integer import is_exact_everywhere
from mxref.weights import MXWeights, decode_mxfp4

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


@pytest.mark.parametrize("suite", SUITES)
def test_names_are_unique(suite: str) -> None:
    names = [case.name for case in SUITES[suite]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["block down", "wide scales", "sentinels"])
def test_a_draw_depends_on_case_and_seed_alone(name: str) -> None:
    case = next(c for c in quick("cpu") if c.name == name)
    assert same(draw(case, "cpu", 3), draw(case, "cpu", 3))
    assert not same(draw(case, "cpu", 3), draw(case, "cpu", 4))
    assert not same(draw(case, "cpu", 3), draw(replace(case, name="another"), "cpu", 3))


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_quick_suite_has_every_option(device_type: str) -> None:
    cases = quick(device_type)
    for option in ("bias", "grouped_in", "grouped_out", "use_fused_dX", "use_fused_gather", "gate_slots"):
        assert {bool(getattr(case, option)) for case in cases} == {True, False}
    assert {"uniform", "empty_experts", "one_expert", "sentinels"} <= {case.routing for case in cases}
    assert {"plain", "balanced", "wide", "boundary"} <= {case.data for case in cases}
    assert {0, 1, 3, 16, 20, 128} <= {case.rank for case in cases}
    assert {1, 2, 8} <= {case.k for case in cases}
    assert any(case.tokens == 0 for case in cases)
    assert any(case.K % 64 and case.N % 64 and case.tokens % 2 for case in cases)
    assert len(full_cases(device_type)) > len(cases)


def test_routings_do_what_they_say() -> None:
    counts = {
        case.name: torch.diff(draw(case).problem.expert_offsets, prepend=torch.tensor([0]))
        for case in quick("cpu")
        if case.name in ("empty experts", "one expert")
    }
    assert not counts["empty experts"][[0, 3, 5]].any()
    assert counts["empty experts"].sum() == 48
    assert counts["one expert"].tolist() == [0, 0, 40, 0]
    sentinels = draw(next(c for c in quick("cpu") if c.name == "sentinels")).problem
    assert 0 < int((sentinels.sorted_expert_idxs == sentinels.E).sum()) < sentinels.P / 2
    ten = draw(Case("ten", 40, 64, 64, 60, 4, routing="ten_active")).problem
    assert len(ten.segments()) == 10


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


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("seed", range(3))
def test_integer_fixtures_are_exact_at_every_rounding_point(device_type: str, seed: int) -> None:
    spread = set()
    for case in integers(device_type):
        sample = draw(case, "cpu", seed)
        strictest = torch.bfloat16 if case.dtype == torch.float32 else case.dtype
        assert is_exact_everywhere(sample.problem, sample.grad_out, RoundingPoints.contract(strictest))
        spread |= set(sample.problem.expert_weights.scales.flatten().tolist())
    if device_type == "cpu":
        assert min(spread) < 30
        assert max(spread) > 224


@pytest.mark.parametrize("seed", range(10))
def test_integer_sums_agree_bit_for_bit_in_shuffled_fp32_orders(seed: int) -> None:
    problem = draw(integers("cpu")[0], "cpu", seed).problem
    x = expert_order_inputs(problem).float()
    draw = torch.Generator().manual_seed(seed)
    for e, start, end in problem.segments():
        W, (A, B) = problem.expert_weight(e).float(), (t.float() for t in problem.expert_lora(e))
        z = x[start:end].double() @ A.double().T
        exact = x[start:end].double() @ W.double() + problem.scaling * (z @ B.double().T)
        operands = torch.cat((W, problem.scaling * (A.T @ B.T))), torch.cat((x[start:end], x[start:end]), 1)
        for _ in range(5):
            total = torch.zeros(end - start, problem.N)
            for k in torch.randperm(2 * problem.K, generator=draw).tolist():
                total = total + operands[1][:, k, None] * operands[0][None, k]
            assert torch.equal(total.double(), exact)


def test_integer_data_that_cannot_be_exact_is_refused() -> None:
    with pytest.raises(ValueError, match="no draw of 40 is exact"):
        draw(Case("a third", 1, 32, 32, 8, 1, 4, data="integer", scaling=1 / 3))


def test_the_exhaustive_fixtures_hold_every_element() -> None:
    weights = all_elements()
    codes, scales = weights.codes(), weights.scales.repeat_interleave(32, 2)
    place = torch.arange(256).expand(2, 256, -1) % 32
    seen = (codes.long() * 256 + scales) * 32 + place
    assert seen.unique().numel() == 16 * 256 * 32
    assert finite_bytes(torch.bfloat16) == finite_bytes(torch.float32) == list(range(253))
    assert finite_bytes(torch.float16) == list(range(141))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_exhaustive_samples_return_the_weights_themselves(dtype: torch.dtype) -> None:
    points = RoundingPoints.contract(dtype)
    sample = finite_sample(dtype, "cpu")
    W = decode_mxfp4(sample.problem.expert_weights, dtype).double()  # [E, N, K]
    fwd = forward(sample.problem, points)
    assert torch.equal(fwd.out.value, W.transpose(1, 2).flatten(0, 1))
    d = backward(sample.problem, fwd, sample.grad_out, points).dx.value
    assert torch.equal(d.view(2, 256, 256)[:, : W.shape[1]], W)
    covered = 0
    for sample in nonfinite_samples(dtype, "cpu"):
        fwd = forward(sample.problem, points)
        d = backward(sample.problem, fwd, sample.grad_out, points).dx.value
        W = decode_mxfp4(sample.problem.expert_weights, dtype).double()
        if sample.case.name.startswith("byte 255 alone"):
            assert fwd.out.value.isnan().all()
            assert d.isnan().all()
            continue
        assert torch.equal(fwd.out.value.nan_to_num(nan=7.0), W.diagonal(0, 1, 2).nan_to_num(nan=7.0))
        assert torch.equal(d.nan_to_num(nan=7.0), fwd.out.value.nan_to_num(nan=7.0))
        covered += W.shape[1] // 32
    assert covered == 256 - len(finite_bytes(dtype))


def test_a_sample_around_given_weights() -> None:
    weights = draw(Case("given", 6, 64, 96)).problem.expert_weights
    sample = sample_for_weights(weights, "layer 0", tokens=9, top_k=4, rank=8, bias=True, gate_slots=4)
    assert sample.problem.expert_weights is weights or torch.equal(sample.problem.expert_weights.packed, weights.packed)
    assert tuple(sample.grad_out.shape) == (9, 96)
    assert sample.problem.rank == 8
