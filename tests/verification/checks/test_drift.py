"""Honest arithmetic never drifts, on many draws; what the checks of drift, sign and exponent promise is seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judging import BY_NAME, quick
from torch import Tensor

from mxref.rounding import round_to
from mxref.scattermoe import RoundingPoints, expert_order_inputs
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS, Accumulation
from mxref.verification.candidates.answer import Answer
from mxref.verification.candidates.shipped import golden, torch_composite
from mxref.verification.cases.call import Call
from mxref.verification.cases.case import Case, Sample, Special
from mxref.verification.cases.draw import draw
from mxref.verification.checks.expectation import Expectation, slopes_of
from mxref.verification.checks.finding import DriftMap, Finding, Status
from mxref.verification.studies.conforming.emulation import Dot, Emulated, blocks, fused_chain, tensor_core

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HOPPER = ACCUMULATIONS["tensor-core-sm90"]
BALANCED = Case("balanced", 2, 256, 128, 32, 2, 16, BF16, data="balanced", bias=True)
RUN = 5000  # slopes of a whole run, about the quick suite's


def stored(sample: Sample, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """fp64 values on the right grid as tensors of the right dtype."""
    p = sample.problem
    like = {"Y": p.inputs, "dX": p.inputs, "dA": p.lora_A, "dB": p.lora_B, "dbias": p.expert_biases, "dgates": p.gates}
    return {name: x.to(like[name].dtype) for name, x in outputs.items()}


def honest_values(expected: Expectation, dtype: torch.dtype) -> dict[str, Tensor]:
    """Each exact value, rounded once."""
    return {name: round_to(interval.exact, dtype).to(dtype) for name, interval in expected.accepted.items()}


def expect(sample: Sample, how: Accumulation = HOPPER) -> Expectation:
    return Expectation(sample, RoundingPoints.contract(sample.case.dtype), how, RUN)


def judge(expected: Expectation, outputs: Mapping[str, Tensor | None]) -> dict[tuple[str, str], Finding]:
    """What the three checks find, by check and tensor."""
    checks = [BY_NAME[name] for name in ("drift", "sign", "exponent")]
    findings = [(check.name, f) for check in checks for f in check.compare([Answer(outputs)], expected)]
    return {(name, finding.tensor): finding for name, finding in findings}


def drift_map(findings: dict[tuple[str, str], Finding], tensor: str) -> DriftMap:
    picture = findings["drift", tensor].picture
    assert isinstance(picture, DriftMap)
    return picture


def broken(findings: dict[tuple[str, str], Finding]) -> set[tuple[str, str]]:
    return {key for key, finding in findings.items() if not finding.ok}


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_plain_pytorch_never_drifts(dtype: torch.dtype) -> None:
    """fp32 sums in whatever order the machine's own product takes, on every option of the quick suite."""
    composite, how = torch_composite(), ACCUMULATIONS["fp32-blocks-256" if dtype == FP32 else "undeclared"]
    skipped = ("boundary scales", "boundary scales, fused", "wide scales") if dtype == FP16 else ()
    for case in quick("cpu"):
        if case.name in skipped or case.use_fused_dX or case.use_fused_gather:
            continue
        for seed in (1, 2) if dtype == BF16 else (1,):
            sample = draw(replace(case, dtype=dtype), "cpu", seed)
            findings = judge(expect(sample, how), composite.run(sample))
            assert [str(finding) for finding in findings.values() if not finding.ok] == []


@pytest.mark.parametrize(
    "case",
    [
        Case("long sums", 1, 512, 64, 40, 1, 16, BF16, data="balanced", bias=True),
        Case("long sums of fp16", 1, 512, 64, 40, 1, 16, FP16, data="balanced"),
        Case("fp32 gradients", 2, 128, 64, 64, 2, 16, BF16, FP32, data="balanced", gate_slots=2),
        Case("sums over slots", 4, 64, 128, 32, 4, 8, BF16, bias=True, routing="sentinels"),
    ],
    ids=lambda case: case.name,
)
def test_truncating_tensor_cores_never_drift(case: Case) -> None:
    points = RoundingPoints.contract(case.dtype)
    for seed in range(3):
        sample = draw(case, "cpu", seed)
        findings = judge(expect(sample), stored(sample, Emulated(tensor_core(), case.dtype, points).run(sample)))
        assert [str(finding) for finding in findings.values() if not finding.ok] == []


def test_blocks_in_any_order_never_drift() -> None:
    case, points = replace(BALANCED, dtype=FP32), RoundingPoints.contract(FP32)
    sample = draw(case, "cpu", 3)
    for order in ("forward", "backward", "shuffled"):
        outputs = stored(sample, Emulated(blocks(64, order), None, points).run(sample))
        assert broken(judge(expect(sample, ACCUMULATIONS["fp32-blocks-64"]), outputs)) == set()


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


@settings(max_examples=30, deadline=None)
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


@settings(max_examples=40, deadline=None)
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


@pytest.mark.parametrize(
    ("dtype", "dot", "how"),
    [
        (BF16, fused_chain(), "fp32-blocks-1"),
        (BF16, tensor_core(), "tensor-core-sm90"),
        (FP32, blocks(64), "fp32-blocks-64"),
    ],
    ids=["fused multiply-adds", "sm_90", "blocks"],
)
def test_rows_that_occur_eight_times_are_far_from_drift(dtype: torch.dtype, dot: Dot, how: str) -> None:
    """Their errors are the same: eight of them count as much as one alone, and yet honest slopes stay small."""
    case, points = Case("alike", 1, 512, 256, 24, 8, 4, dtype, data="balanced", routing="one_expert"), RoundingPoints
    for seed in range(3):
        sample, narrow = draw(case, "cpu", seed), None if dtype == FP32 else dtype
        outputs = stored(sample, Emulated(dot, narrow, points.contract(dtype), ACCUMULATIONS[how]).run(sample))
        findings = judge(expect(sample, ACCUMULATIONS[how]), outputs)
        assert broken(findings) == set()
        z = torch.from_numpy(drift_map(findings, "Y").z)
        assert float(z[z.isfinite()].abs().max()) < 3, "half of what a whole run allows"


@pytest.mark.parametrize(
    "case",
    [
        # One row an expert and N = 1: V, rounded once, is in every element of dA, and an expanded B repeats it.
        Case("one V", 260, 32, 1, 9, 8, 4, FP32, data="lora", scaling=1 / 3, grouped_out=True, routing="sentinels",
             call=Call(adapters="expanded")),
        # Every column of dY, and so of dBᵀ, is the same.
        Case("one column", 260, 32, 33, 48, 8, 20, BF16, data="balanced", scaling=1 / 3, gate_slots=8, dense=True,
             routing="empty_experts", gate_values="some zero", call=Call(weights="expanded", dOut="one number")),
    ],
    ids=lambda case: case.name,
)  # fmt: skip
def test_errors_that_many_elements_share_are_no_drift(case: Case) -> None:
    composite, how = torch_composite(), ACCUMULATIONS["undeclared"]
    for seed in range(8):
        sample = draw(case, "cpu", seed)
        expected = Expectation(sample, RoundingPoints.contract(case.dtype), how)
        findings = judge(expected, composite.run(sample))
        assert [str(finding) for finding in findings.values() if not finding.ok] == []


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
        assert bool((abs(of_all_experts) > RUN**0.25).all()), tensor


def test_what_rounds_to_infinity_is_no_drift() -> None:
    """Of results around 65504 some are infinite in fp16, and the others say nothing of all."""
    case = Case("large", 4, 64, 96, 24, 2, 16, FP16, data="large", bias=True)
    for seed in range(4):
        expected = expect(draw(case, "cpu", seed))
        findings = judge(expected, honest_values(expected, FP16))
        infinite = {name for name, x in honest_values(expected, FP16).items() if bool(x.isinf().any())}
        assert {"dA", "dB", "dbias"} <= infinite
        assert broken(findings) == set()
    lost = honest_values(expected, FP16)
    lost["Y"][0, 0] = torch.inf
    assert ("drift", "Y") in broken(judge(expected, lost))


def test_a_row_that_adds_one_value_to_itself_is_no_drift() -> None:
    """(g₁ + g₂)·v with g₁ + g₂ = 1 + 2^-11 is rounded down everywhere, by whoever computes it."""
    case = Case("twice", 2, 64, 1024, 64, 2, 4, torch.float16, data="balanced", routing="one_expert", gate_slots=2)
    drawn = draw(case)
    assert drawn.problem.gates is not None
    gates = torch.tensor([251 / 256, 41 / 2048], dtype=drawn.problem.gates.dtype).expand_as(drawn.problem.gates)
    sample = drawn.changed(gates=gates.contiguous())
    expected = Expectation(sample, RoundingPoints.contract(torch.float16), HOPPER)
    findings = BY_NAME["drift"].compare([Answer(golden().run(sample))], expected)
    assert {(f.tensor, f.status) for f in findings if f.status is not Status.PASS} == set()


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
