"""Honest arithmetic never drifts, on many draws; what the guard promises to see it sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judging import quick
from torch import Tensor

from mxref.rounding import round_to
from mxref.scattermoe import RoundingPoints, expert_order_inputs
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS, Accumulation
from mxref.verification.arithmetic.thresholds import ON_A_GRID, critical_z, directed_loss, residual_variance
from mxref.verification.candidates.shipped import golden, torch_composite
from mxref.verification.cases.case import Case, Sample
from mxref.verification.cases.draw import draw
from mxref.verification.checks.drift import drift_guard, slopes_of
from mxref.verification.checks.finding import DriftMap, Finding, Status
from mxref.verification.studies.conforming.emulation import Emulated, blocks, tensor_core

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HOPPER = ACCUMULATIONS["tensor-core-sm90"]
BALANCED = Case("balanced", 2, 256, 128, 32, 2, 16, BF16, data="balanced", bias=True)
RUN = 5000  # slopes of a whole run, about the quick suite's


@dataclass
class Fixed:
    """A candidate that always returns the same."""

    outputs: dict[str, Tensor]

    def run(self, sample: Sample) -> dict[str, Tensor]:
        return self.outputs


def stored(sample: Sample, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """fp64 values on the right grid as tensors of the right dtype."""
    p = sample.problem
    like = {"Y": p.inputs, "dX": p.inputs, "dA": p.lora_A, "dB": p.lora_B, "dbias": p.expert_biases, "dgates": p.gates}
    return {name: x.to(like[name].dtype) for name, x in outputs.items()}


def honest_values(expected: Expectation, dtype: torch.dtype) -> dict[str, Tensor]:
    """Each exact value, rounded once."""
    return {name: round_to(interval.exact, dtype).to(dtype) for name, interval in expected.accepted.items()}


def judge(
    sample: Sample,
    outputs: dict[str, Tensor],
    how: Accumulation = HOPPER,
    expected: Expectation | None = None,
    slopes: int | None = RUN,
) -> tuple[dict[tuple[str, str], Finding], list[DriftMap]]:
    points = RoundingPoints.contract(sample.case.dtype)
    findings, maps = drift_guard(Fixed(outputs), sample, points, how, slopes, expected=expected)
    return {(finding.check, finding.tensor): finding for finding in findings}, maps


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
            findings, _ = drift_guard(composite, sample, composite.points(dtype), how, RUN)
            assert [str(finding) for finding in findings if not finding.ok] == []


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
        findings, _ = judge(sample, stored(sample, Emulated(tensor_core(), case.dtype, points).run(sample)))
        assert [str(finding) for finding in findings.values() if not finding.ok] == []


def test_blocks_in_any_order_never_drift() -> None:
    case, points = replace(BALANCED, dtype=FP32), RoundingPoints.contract(FP32)
    sample = draw(case, "cpu", 3)
    for order in ("forward", "backward", "shuffled"):
        outputs = stored(sample, Emulated(blocks(64, order), None, points).run(sample))
        findings, _ = judge(sample, outputs, ACCUMULATIONS["fp32-blocks-64"])
        assert broken(findings) == set()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_two_ten_thousandths_on_lora_alone_are_seen(dtype: torch.dtype) -> None:
    """On 64 × 64 tiles, at the critical z of a whole run."""
    case, caught = Case("tile", 1, 256, 64, 64, 1, 16, dtype, data="balanced"), 0
    how = HOPPER if dtype == BF16 else ACCUMULATIONS["fp32-blocks-64"]
    for seed in range(12):
        sample = draw(case, "cpu", seed)
        expected = expect(sample, RoundingPoints.contract(dtype), how)
        lora = expected.fwd.y.exact - expert_order_inputs(sample.problem) @ sample.problem.expert_weight(0)
        by_position = torch.empty_like(lora)
        by_position[sample.problem.row_positions()] = lora
        outputs = honest_values(expected, dtype)
        assert broken(judge(sample, outputs, how, expected)[0]) == set()
        outputs["Y"] = round_to(expected.fwd.out.exact + 2e-4 * by_position, dtype).to(dtype)
        finding = judge(sample, outputs, how, expected)[0]["drift", "Y"]
        caught += not finding.ok
        assert finding.ok or "LoRA's term is scaled by 1.000" in finding.reason
    assert caught >= 11


def test_a_thousandth_in_one_tile_of_one_expert_is_seen_and_placed() -> None:
    sample = draw(Case("tiles", 2, 256, 192, 64, 2, 16, BF16, data="balanced"), "cpu", 5)
    expected = expect(sample, RoundingPoints.contract(BF16), HOPPER)
    (_, start, end), *_ = [s for s in sample.problem.segments() if s[0] == 1]
    rows = sample.problem.row_positions()[start:end]
    outputs = honest_values(expected, BF16)
    exact = expected.accepted["Y"].exact.clone()
    exact[rows, 64:128] *= 1 + 1e-3
    outputs["Y"] = round_to(exact, BF16).to(BF16)
    findings, maps = judge(sample, outputs, expected=expected)
    assert broken(findings) == {("drift", "Y")}
    assert "expert 1, columns 64–127" in findings["drift", "Y"].reason
    drawn = next(m for m in maps if m.tensor == "Y")
    assert drawn.rows == ["expert 0", "expert 1", "all experts"]
    assert drawn.columns == ["columns 0–63", "columns 64–127", "columns 128–191", "all columns"]
    assert divmod(int(abs(drawn.z).argmax()), 4) == (1, 1)


Change = Callable[[Tensor], Tensor]


def zero_rows(x: Tensor) -> Tensor:
    x = x.clone()
    x[2:5] = 0
    return x


@pytest.mark.parametrize(
    ("change", "guards", "words"),
    [
        (lambda x: 2 * x, {"drift", "exponent"}, "ratio 2^+1 in 128 of 128 columns"),
        (lambda x: torch.cat((x[:, :37] / 4, x[:, 37:]), 1), {"drift", "exponent"}, "ratio 2^-2 in 37 of 128 columns"),
        (zero_rows, {"drift", "sign", "exponent"}, "dropped: 3 of 64 rows are zero"),
        (lambda x: x.roll(1, 0), {"drift", "sign", "exponent"}, "values from elsewhere"),
        (lambda x: -x, {"drift", "sign"}, "sign flipped"),
    ],
    ids=["doubled", "a quarter", "dropped", "shifted", "negated"],
)
def test_gross_bugs_are_named(change: Change, guards: set[str], words: str) -> None:
    sample = draw(BALANCED, "cpu", 1)
    expected = expect(sample, RoundingPoints.contract(BF16), HOPPER)
    outputs = honest_values(expected, BF16)
    outputs["Y"] = change(outputs["Y"])
    findings, maps = judge(sample, outputs, expected=expected)
    assert broken(findings) == {(guard, "Y") for guard in guards}
    assert words in " ".join(f.reason for f in findings.values())
    if "exponent" in guards:
        example = findings["exponent", "Y"].counterexample
        assert example is not None
        assert not example.low <= example.got <= example.high
    counts = next(m.log2_ratio for m in maps if m.tensor == "Y")
    honest = next(m.log2_ratio for m in judge(sample, honest_values(expected, BF16), expected=expected)[1])
    assert set(honest) == {0}
    assert words != "ratio 2^+1 in 128 of 128 columns" or set(counts) == {1}


def test_a_missing_or_doubled_adapter_is_named() -> None:
    sample = draw(BALANCED, "cpu", 2)
    expected = expect(sample, RoundingPoints.contract(BF16), HOPPER)
    alone = Sample(sample.case, replace(sample.problem, scaling=0.0), sample.grad_out)
    without = expect(alone, RoundingPoints.contract(BF16), HOPPER).accepted["Y"].exact
    twice = 2 * expected.accepted["Y"].exact - without
    for exact, words in ((without, "LoRA's term is missing"), (twice, "LoRA's term is scaled by 2^+1")):
        outputs = honest_values(expected, BF16) | {"Y": round_to(exact, BF16).to(BF16)}
        assert words in judge(sample, outputs, expected=expected)[0]["drift", "Y"].reason


PROMISE = draw(BALANCED, "cpu", 7)
PROMISED = expect(PROMISE, RoundingPoints.contract(BF16), HOPPER)


@settings(max_examples=30, deadline=None)
@given(
    tensor=st.sampled_from(["Y", "dX", "dA", "dB"]),
    times=st.floats(1.0, 30.0),
    sign=st.sampled_from([-1, 1]),
)
def test_what_a_finding_says_it_resolves_it_sees(tensor: str, times: float, sign: int) -> None:
    honest = honest_values(PROMISED, BF16)
    findings, _ = judge(PROMISE, honest, expected=PROMISED)
    assert broken(findings) == set()
    resolution = findings["drift", tensor].details["resolution"]
    assert isinstance(resolution, float)
    scaled = round_to(PROMISED.accepted[tensor].exact * (1 + sign * times * resolution), BF16).to(BF16)
    assert ("drift", tensor) in broken(judge(PROMISE, honest | {tensor: scaled}, expected=PROMISED)[0])


@settings(max_examples=40, deadline=None)
@given(tensor=st.sampled_from(["Y", "dX"]), kind=st.sampled_from(["shift", "permute", "drop", "swap"]), draw=st.data())
def test_moved_and_lost_rows_are_always_seen(tensor: str, kind: str, draw: st.DataObject) -> None:
    honest = honest_values(PROMISED, BF16)
    x = honest[tensor].clone()
    M = x.shape[0]
    first, second = draw.draw(st.lists(st.integers(0, M - 1), min_size=2, max_size=2, unique=True))
    if kind == "shift":
        x = x.roll(draw.draw(st.integers(1, M - 1)), 0)
    elif kind == "permute":
        x = x[torch.tensor(draw.draw(st.permutations(range(M)).filter(lambda order: order != list(range(M)))))]
    elif kind == "drop":
        x[first] = 0
    else:
        x[[first, second]] = x[[second, first]]
    seen = broken(judge(PROMISE, honest | {tensor: x}, expected=PROMISED)[0])
    assert ("sign", tensor) in seen
    assert ("exponent", tensor) in seen


def test_legacy_columns_are_reported_and_decide_nothing() -> None:
    outputs = honest_values(PROMISED, BF16)
    outputs["Y"] = 2 * outputs["Y"]
    finding = judge(PROMISE, outputs, expected=PROMISED)[0]["drift", "Y"]
    assert not finding.ok
    assert finding.details["legacy, not judged: ratio std < 0.5"] == "pass"
    assert finding.details["legacy, not judged: allclose, rtol = atol = 0.01"] == "fail"
    assert finding.details["legacy, not judged: ratio mean"] == pytest.approx(2, rel=1e-3)


def test_nothing_to_fit_and_what_cannot_be_fitted() -> None:
    empty = draw(Case("no rows", 2, 64, 64, 0, 1, 4, BF16))
    findings, _ = drift_guard(golden(), empty, RoundingPoints.contract(BF16), HOPPER)
    assert all(finding.ok for finding in findings)
    zero = PROMISE.problem.lora_B
    assert zero is not None
    sample = Sample(PROMISE.case, replace(PROMISE.problem, lora_B=torch.zeros_like(zero)), PROMISE.grad_out)
    findings, _ = drift_guard(golden(), sample, RoundingPoints.contract(BF16), HOPPER)
    assert all(finding.ok for finding in findings)
    outputs = honest_values(PROMISED, BF16)
    outputs["Y"][3, 4] = torch.nan
    finding = judge(PROMISE, outputs, expected=PROMISED)[0]["drift", "Y"]
    assert finding.status is Status.FAIL
    assert finding.reason.startswith("1 of 8192 elements are NaN")


def test_thresholds() -> None:
    assert critical_z(1, 0.05) == pytest.approx(1.959964, abs=1e-6)
    assert critical_z(10_000) > critical_z(10)
    assert slopes_of(Case("", 4, 65, 64, rank=4)) == 5 * 2 * 3 + 5 * 3 * 3 + 5 * 3 + 5 * 2
    assert slopes_of(Case("", 4, 64, 64, rank=0)) == 2 * 5 * 2
    how = ACCUMULATIONS["fp32-blocks-64"]
    assert directed_loss(how, FP32, 512) == directed_loss(ACCUMULATIONS["undeclared"], FP32, 512) == 0
    assert directed_loss(HOPPER, BF16, 512) == 33 * 2.0**-25
    assert directed_loss(HOPPER, BF16, 512, resident=True) == 32 * 2.0**-24


def test_sums_of_rounded_terms_have_the_variance_that_is_claimed() -> None:
    """Grids of spacing h/m: ties are part of them, and m = 2 is the worst."""
    draw = torch.Generator().manual_seed(0)
    for m in (2, 4, 8):
        x = torch.randint(2**7 * m, 2**8 * m, (40_000,), generator=draw).double() / m
        error = round_to(x, BF16) - x
        claimed = residual_variance(torch.ones(1).double(), torch.zeros(1).double(), ON_A_GRID)
        assert float(error.square().mean()) == pytest.approx((1 + 2 / m**2) / 12, rel=0.03)
        assert float(error.square().mean()) < 1.03 * float(claimed)
