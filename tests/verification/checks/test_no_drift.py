"""Honest arithmetic never drifts, on many draws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from drifting import (
    BALANCED,
    BF16,
    FP16,
    FP32,
    HOPPER,
    broken,
    drift_map,
    expect,
    honest_values,
    judge,
    stored,
)
from judging import BY_NAME, quick

from mxref.rounding import round_to
from mxref.scattermoe import RoundingPoints, expert_order_gates
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS
from mxref.verification.arithmetic.metrics import ulp
from mxref.verification.candidates.answer import Answer
from mxref.verification.candidates.shipped import golden, torch_composite
from mxref.verification.cases.call import Call
from mxref.verification.cases.case import Case
from mxref.verification.cases.draw import draw
from mxref.verification.checks.expectation import Expectation
from mxref.verification.checks.finding import Status
from mxref.verification.studies.honest.emulation import Dot, Emulated, blocks, fused_chain, tensor_core


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
             call=Call(A="expanded", B="expanded")),
        # Every column of dY, and so of dBᵀ, is the same.
        Case("one column", 260, 32, 33, 48, 8, 20, BF16, data="balanced", scaling=1 / 3, gate_slots=8, dense=True,
             routing="empty_experts", gate_values="some zero", call=Call(weights="expanded", dOut="one number")),
    ],
    ids=lambda case: case.name,
)  # fmt: skip
def test_errors_that_many_elements_share_are_no_drift(case: Case) -> None:
    composite, how = torch_composite(), ACCUMULATIONS["undeclared"]
    for seed in range(4):
        sample = draw(case, "cpu", seed)
        expected = Expectation(sample, RoundingPoints.contract(case.dtype), how)
        findings = judge(expected, composite.run(sample))
        assert [str(finding) for finding in findings.values() if not finding.ok] == []


@pytest.mark.parametrize("seed", [22, 26])  # the nearest value is so near to the middle that either is right
def test_equal_rows_that_round_to_the_neighbour_together_are_no_drift(seed: int) -> None:
    """The value nearest to the middle between two numbers goes to either, in every row that has it, before rows sum."""
    case = Case("equal rows", 16, 96, 1, 4800, 1, 8, FP16, data="balanced", bias=True, nan_bias=True, gate_slots=2,
                call=Call(x="expanded"))  # fmt: skip
    expected = expect(draw(case, "cpu", seed))
    rows, problem = expected.fwd.y, expected.sample.problem
    spacing, off = ulp(rows.exact, FP16), rows.value - rows.exact
    nearest = int((off / spacing).abs().nan_to_num(nan=0.0).argmax())
    assert expected.propagation.y.radius[nearest] == spacing[nearest]
    alike = rows.exact == rows.exact[nearest]
    assert int(alike.sum()) > 200
    moved = torch.where(alike, rows.value - off.sign() * spacing, rows.value)
    total = torch.zeros(2400, 1, dtype=torch.float64)
    total.index_add_(0, problem.row_positions() // 2, expert_order_gates(problem)[:, None] * moved)
    findings = judge(expected, honest_values(expected, FP16) | {"Y": round_to(total, FP16).to(FP16)})
    assert broken(findings) == set()


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


def test_a_product_with_s_that_rounds_alike_everywhere_is_no_drift() -> None:
    """Where V is the same in every row so is the error of s·V in fp32, and nothing else may be wrong."""
    case = Case("one s·V", 260, 96, 96, 48, 1, 8, FP16, adapter_dtype=FP32, data="balanced", scaling=1 / 3,
                call=Call(B="expanded", dOut="expanded"))  # fmt: skip
    expected = expect(draw(case), ACCUMULATIONS["fp32-blocks-64"])
    exact = expected.accepted["dA"].exact
    for factor, found in ((1 + 2.0**-24, set()), (1 + 2.0**-20, {("drift", "dA")})):
        outputs = honest_values(expected, FP16) | {"dA": (exact * factor).float()}
        assert broken(judge(expected, outputs)) == found


@pytest.mark.parametrize("how", ["tensor-core-sm90", "tensor-core-sm80"])
def test_long_sums_of_one_sign_are_no_drift(how: str) -> None:
    """One row of x and one of dOut in a thousand slots: a tensor core cuts each product where the sum's bits end."""
    case = Case("one token", 1, 32, 64, 70, 17, 1, FP16, adapter_dtype=FP32, data="balanced", scaling=0.5,
                gate_slots=1190, grouped_in=True, call=Call(x="expanded"))  # fmt: skip
    points = RoundingPoints.contract(FP16)
    for seed in range(3):
        sample = draw(case, "cpu", seed)
        dot = tensor_core(ACCUMULATIONS[how].step, ACCUMULATIONS[how].fraction_bits)
        outputs = stored(sample, Emulated(dot, FP16, points, ACCUMULATIONS[how]).run(sample))
        findings = judge(expect(sample, ACCUMULATIONS[how]), outputs)
        assert broken(findings) == set()
