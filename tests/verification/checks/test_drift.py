"""What the checks of drift, sign and exponent promise is seen, and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from drifting import BALANCED, BF16, FP32, HOPPER, broken, drift_map, expect, honest_values, judge
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxref.rounding import round_to
from mxref.scattermoe import expert_order_gates, expert_order_inputs
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS
from mxref.verification.arithmetic.thresholds import directed_loss
from mxref.verification.candidates.shipped import golden
from mxref.verification.cases.call import Call, Layout
from mxref.verification.cases.case import Case, Special
from mxref.verification.cases.draw import draw
from mxref.verification.checks.drift import _losses
from mxref.verification.checks.expectation import Expectation, slopes_of
from mxref.verification.checks.finding import Status


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_two_ten_thousandths_on_lora_alone_are_seen(dtype: torch.dtype) -> None:
    """On 64 × 64 tiles, at the critical z of a whole run."""
    case, caught = Case("tile", 1, 256, 64, 64, 1, 16, dtype, data="balanced"), 0
    how = HOPPER if dtype == BF16 else ACCUMULATIONS["fp32-blocks-64"]
    for seed in range(12):
        sample = draw(case, "cpu", seed)
        expected = expect(sample, how)
        lora = expected.fwd.y.exact - expert_order_inputs(sample.problem) @ sample.problem.expert_weight(0)
        by_position = torch.empty_like(lora)
        by_position[sample.problem.row_positions()] = lora
        outputs = honest_values(expected, dtype)
        assert broken(judge(expected, outputs)) == set()
        outputs["Y"] = round_to(expected.fwd.out.exact + 2e-4 * by_position, dtype).to(dtype)
        finding = judge(expected, outputs)["drift", "Y"]
        caught += not finding.ok
        assert finding.ok or "LoRA's term is scaled by 1.000" in finding.reason
    assert caught >= 11


@pytest.mark.parametrize(
    ("layout", "times"), [("contiguous", 1 + 4 * 3 / 2400**0.5), ("expanded", 5), ("one number", 5)]
)
@pytest.mark.parametrize(("tensor", "along"), [("dA", "N"), ("dB", "K")])
def test_terms_of_one_sign_lose_what_is_cut_of_each(layout: Layout, times: float, tensor: str, along: str) -> None:
    """In sums over one row again and again: sixteen products end two bits below the sum and lose four times as much."""
    sample = draw(Case("repeated", 1, 64, 96, 2400, 1, 8, BF16, data="balanced", call=Call(x=layout, dOut=layout)))
    inner = directed_loss(HOPPER, BF16, getattr(sample.problem, along))
    expected = times * directed_loss(HOPPER, BF16, 2400) + inner + 2.0**-23  # s, and a product with it
    assert _losses(sample, tensor, 2400, HOPPER) == pytest.approx((expected,) * 3, rel=1e-12)


def test_a_thousandth_in_one_tile_of_one_expert_is_seen_and_placed() -> None:
    sample = draw(Case("tiles", 2, 256, 192, 64, 2, 16, BF16, data="balanced"), "cpu", 5)
    expected = expect(sample)
    (_, start, end), *_ = [s for s in sample.problem.segments() if s[0] == 1]
    rows = sample.problem.row_positions()[start:end]
    outputs = honest_values(expected, BF16)
    exact = expected.accepted["Y"].exact.clone()
    exact[rows, 64:128] *= 1 + 1e-3
    outputs["Y"] = round_to(exact, BF16).to(BF16)
    findings = judge(expected, outputs)
    assert broken(findings) == {("drift", "Y")}
    assert "expert 1, columns 64–127" in findings["drift", "Y"].reason
    drawn = drift_map(findings, "Y")
    assert drawn.rows == ["expert 0", "expert 1", "all experts"]
    assert drawn.columns == ["columns 0–63", "columns 64–127", "columns 128–191", "all columns"]
    assert divmod(int(abs(drawn.z).argmax()), 4) == (1, 1)


Change = Callable[[Tensor], Tensor]


def zero_rows(x: Tensor) -> Tensor:
    x = x.clone()
    x[2:5] = 0
    return x


@pytest.mark.parametrize(
    ("change", "checks", "words"),
    [
        (lambda x: 2 * x, {"drift", "exponent"}, "ratio 2^+1 in 128 of 128 columns"),
        (lambda x: torch.cat((x[:, :37] / 4, x[:, 37:]), 1), {"drift", "exponent"}, "ratio 2^-2 in 37 of 128 columns"),
        (zero_rows, {"drift", "sign", "exponent"}, "dropped: 3 of 64 rows are zero"),
        (lambda x: x.roll(1, 0), {"drift", "sign", "exponent"}, "values from elsewhere"),
        (lambda x: -x, {"drift", "sign"}, "sign flipped"),
    ],
    ids=["doubled", "a quarter", "dropped", "shifted", "negated"],
)
def test_gross_bugs_are_named(change: Change, checks: set[str], words: str) -> None:
    sample = draw(BALANCED, "cpu", 1)
    expected = expect(sample)
    outputs = honest_values(expected, BF16)
    outputs["Y"] = change(outputs["Y"])
    findings = judge(expected, outputs)
    assert broken(findings) == {(check, "Y") for check in checks}
    assert words in " ".join(f.reason for f in findings.values())
    if "exponent" in checks:
        example = findings["exponent", "Y"].counterexample
        assert example is not None
        assert not example.low <= example.got <= example.high
    counts = drift_map(findings, "Y").log2_ratio
    assert set(drift_map(judge(expected, honest_values(expected, BF16)), "Y").log2_ratio) == {0}
    assert words != "ratio 2^+1 in 128 of 128 columns" or set(counts) == {1}


def test_a_missing_or_doubled_adapter_is_named() -> None:
    sample = draw(BALANCED, "cpu", 2)
    expected = expect(sample)
    without = expect(sample.changed(scaling=0.0)).accepted["Y"].exact
    twice = 2 * expected.accepted["Y"].exact - without
    for exact, words in ((without, "LoRA's term is missing"), (twice, "LoRA's term is scaled by 2^+1")):
        outputs = honest_values(expected, BF16) | {"Y": round_to(exact, BF16).to(BF16)}
        assert words in judge(expected, outputs)["drift", "Y"].reason


PROMISE = draw(BALANCED, "cpu", 7)
PROMISED = expect(PROMISE)


@settings(max_examples=30)
@given(
    tensor=st.sampled_from(["Y", "dX", "dA", "dB"]),
    times=st.floats(1.0, 30.0),
    sign=st.sampled_from([-1, 1]),
)
def test_what_a_finding_says_it_resolves_it_sees(tensor: str, times: float, sign: int) -> None:
    honest = honest_values(PROMISED, BF16)
    findings = judge(PROMISED, honest)
    assert broken(findings) == set()
    resolution = findings["drift", tensor].details["resolution"]
    assert isinstance(resolution, float)
    scaled = round_to(PROMISED.accepted[tensor].exact * (1 + sign * times * resolution), BF16).to(BF16)
    assert ("drift", tensor) in broken(judge(PROMISED, honest | {tensor: scaled}))


@settings(max_examples=40)
@given(tensor=st.sampled_from(["Y", "dX"]), kind=st.sampled_from(["shift", "permute", "drop", "swap"]), data=st.data())
def test_moved_and_lost_rows_are_always_seen(tensor: str, kind: str, data: st.DataObject) -> None:
    honest = honest_values(PROMISED, BF16)
    x = honest[tensor].clone()
    M = x.shape[0]
    first, second = data.draw(st.lists(st.integers(0, M - 1), min_size=2, max_size=2, unique=True))
    if kind == "shift":
        x = x.roll(data.draw(st.integers(1, M - 1)), 0)
    elif kind == "permute":
        x = x[torch.tensor(data.draw(st.permutations(range(M)).filter(lambda order: order != list(range(M)))))]
    elif kind == "drop":
        x[first] = 0
    else:
        x[[first, second]] = x[[second, first]]
    seen = broken(judge(PROMISED, honest | {tensor: x}))
    assert ("sign", tensor) in seen
    assert ("exponent", tensor) in seen


def test_criteria_in_wide_use_are_reported_and_decide_nothing() -> None:
    outputs = honest_values(PROMISED, BF16)
    outputs["Y"] = 2 * outputs["Y"]
    finding = judge(PROMISED, outputs)["drift", "Y"]
    assert not finding.ok
    assert finding.details["not judged: ratio std < 0.5"] == "pass"
    assert finding.details["not judged: allclose, rtol = atol = 0.01"] == "fail"
    assert finding.details["not judged: ratio mean"] == pytest.approx(2, rel=1e-3)


def test_nothing_to_fit_and_what_cannot_be_fitted() -> None:
    empty = draw(Case("no rows", 2, 64, 64, 0, 1, 4, BF16))
    assert broken(judge(expect(empty), golden().run(empty))) == set()
    zero = PROMISE.problem.lora_B
    assert zero is not None
    sample = PROMISE.changed(lora_B=torch.zeros_like(zero))
    assert broken(judge(expect(sample), golden().run(sample))) == set()
    outputs = honest_values(PROMISED, BF16)
    outputs["Y"][3, 4] = torch.nan
    finding = judge(PROMISED, outputs)["drift", "Y"]
    assert finding.status is Status.FAIL
    assert finding.reason.startswith("1 of 8192 elements are NaN")


def test_the_most_slopes_of_a_case_are_counted() -> None:
    assert slopes_of(Case("", 4, 65, 64, rank=4)) == 5 * 2 * 3 + 5 * 3 * 3 + 5 * 3 + 5 * 2
    assert slopes_of(Case("", 4, 64, 64, rank=0)) == 2 * 5 * 2


@pytest.mark.parametrize("special", ["inf row", "nan row", "inf dOut", "nan expert"])
def test_drift_is_seen_beside_what_is_not_finite(special: Special) -> None:
    """In Y, dX, dA and dB each: what is not finite takes its own rows out, or its own expert, and no other."""
    sample = draw(replace(BALANCED, experts=4, tokens=64, special=special, gate_slots=2), "cpu", 1)
    expected = expect(sample)
    outputs = {name: x * (1 + 2.0**-6) for name, x in honest_values(expected, BF16).items()}
    findings = judge(expected, outputs)
    assert {tensor for check, tensor in broken(findings) if check == "drift"} == {"Y", "dX", "dA", "dB"}
    for tensor in ("Y", "dX", "dA", "dB"):
        of_all_experts = drift_map(findings, tensor).z[-1]
        assert bool((abs(of_all_experts) > expected.critical).all()), tensor


def test_values_that_rounding_made_equal_count_each() -> None:
    """A thousandth in one tile of dX is seen, whose rows in 16 bits have 128 mantissas, and in dA, as V has."""
    sample = draw(Case("one slot", 2, 256, 128, 64, 1, 16, BF16, data="balanced"), "cpu", 3)
    expected, factor = expect(sample), torch.ones(64, 256, dtype=torch.float64)
    _, start, end = sample.problem.segments()[1]
    factor[start:end, 64:128] += 1e-3
    rows = torch.empty_like(factor)
    rows[sample.problem.row_positions()] = round_to(factor * expected.bwd.d.exact, BF16)
    outputs = honest_values(expected, BF16)
    assert broken(judge(expected, outputs)) == set()
    assert ("drift", "dX") in broken(judge(expected, outputs | {"dX": rows.to(BF16)}))

    expected = expect(draw(Case("gates", 2, 256, 128, 64, 2, 16, BF16, data="balanced", gate_slots=2), "cpu", 3))
    outputs = honest_values(expected, BF16)
    assert broken(judge(expected, outputs)) == set()
    larger = round_to(1.001 * expected.accepted["dA"].exact, BF16).to(BF16)
    assert ("drift", "dA") in broken(judge(expected, outputs | {"dA": larger}))


SLOTS = Case("slots", 2, 256, 192, 64, 2, 16, BF16, data="balanced", gate_slots=2)


def of_rows(expected: Expectation, tensor: str, factor: Tensor | float) -> Tensor:
    """Y or dX [R, C] of rows, in expert order, that were multiplied before they were rounded and summed up."""
    problem = expected.sample.problem
    rows, gates = (expected.bwd.d, 1.0) if tensor == "dX" else (expected.fwd.y, expert_order_gates(problem)[:, None])
    rounded = gates * round_to(factor * rows.exact, BF16)
    return round_to(torch.zeros(64, rounded.shape[1]).double().index_add_(0, problem.row_sources(), rounded), BF16)


@pytest.mark.parametrize("tensor", ["Y", "dX"])
def test_three_ten_thousandths_of_rows_that_are_summed_up_are_seen_and_placed(tensor: str) -> None:
    """In one tile of one expert, where some sums cancel to nothing but the rounding of their rows."""
    for seed in range(3):
        expected = expect(draw(SLOTS, "cpu", seed))
        honest, factor = honest_values(expected, BF16), torch.ones(128, 256 if tensor == "dX" else 192).double()
        assert torch.equal(honest[tensor].double(), of_rows(expected, tensor, 1.0))
        _, start, end = expected.sample.problem.segments()[1]
        factor[start:end, 64:128] += 3e-4
        findings = judge(expected, honest | {tensor: of_rows(expected, tensor, factor).to(BF16)})
        assert ("drift", tensor) in broken(findings)
        assert "in expert 1, columns 64–127" in findings["drift", tensor].reason
        resolution = findings["drift", tensor].details["resolution"]
        assert isinstance(resolution, float)
        larger = of_rows(expected, tensor, 1 + resolution).to(BF16)
        assert ("drift", tensor) in broken(judge(expected, honest | {tensor: larger}))


@pytest.mark.parametrize("tensor", ["dX", "dA", "dB"])
def test_gates_cost_no_power(tensor: str) -> None:
    """gate·dOut is rounded, but to the same bits by everyone: three ten-thousandths on all of a gradient are seen."""
    for seed in range(3):
        expected = expect(draw(SLOTS, "cpu", seed))
        honest = honest_values(expected, BF16)
        assert broken(judge(expected, honest)) == set()
        exact = of_rows(expected, tensor, 1.0003) if tensor == "dX" else 1.0003 * expected.accepted[tensor].exact
        findings = judge(expected, honest | {tensor: round_to(exact, BF16).to(BF16)})
        assert ("drift", tensor) in broken(findings)
        z = drift_map(findings, tensor).z
        assert bool((abs(z[-1]) > expected.critical).all()), "all experts, in every tile"
