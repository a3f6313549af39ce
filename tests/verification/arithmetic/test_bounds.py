"""Bounds hold for everything honest and for nothing else.

Honest arithmetic is emulated, independently of the code under test; see `studies.honest.emulation`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bounded import HONEST, accepted, outside
from judging import integers, quick
from torch import Tensor

from mxref.rounding import round_to
from mxref.scattermoe import RoundingPoints, expert_order_inputs, forward
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS
from mxref.verification.arithmetic.interval import rho
from mxref.verification.cases.case import Case
from mxref.verification.cases.draw import draw
from mxref.verification.studies.honest.emulation import (
    Emulated,
    blocks,
    fused_chain,
    position,
    r32,
    tensor_core,
)

BF16, FP32 = torch.bfloat16, torch.float32


def small_cases(dtype: torch.dtype) -> list[Case]:
    """The quick suite's options at sizes that the emulation can afford."""
    cases = [c for c in quick("cpu") if not (c.use_fused_dX or c.use_fused_gather) and c.tokens > 1]
    return [
        replace(
            c,
            experts=c.experts if c.top_k > 2 else min(c.experts, 6),
            K=min(c.K, 192 if c.data == "boundary" else 64),
            N=32,
            tokens=24 // c.top_k,
            rank=min(c.rank, 20),
            dtype=dtype,
        )
        for c in [*cases, *integers("cpu")[:2]]
    ]


@pytest.mark.parametrize("case", small_cases(BF16), ids=lambda c: c.name)
@pytest.mark.parametrize("arch", ["sm90", "sm80"])
def test_emulated_tensor_cores_stay_inside_their_running_bound(case: Case, arch: str) -> None:
    how = ACCUMULATIONS[f"tensor-core-{arch}"]
    points = RoundingPoints.contract(BF16)
    sample = draw(case, "cpu", 1)
    outputs = Emulated(tensor_core(how.step, how.fraction_bits), BF16, points).run(sample)
    assert not any(outside(outputs, accepted(sample, points, how)).values())
    assert not any(outside(outputs, accepted(sample, points, ACCUMULATIONS["undeclared"])).values())


@pytest.mark.parametrize("honest", HONEST)
def test_honest_fp32_orders_stay_inside_the_order_free_bound(honest: str) -> None:
    points = RoundingPoints.contract(FP32)
    for case in small_cases(FP32):
        if case.name in ("odd sizes", "sentinels, gates", "boundary scales"):
            sample = draw(case, "cpu", 2)
            outputs = Emulated(HONEST[honest], None, points).run(sample)
            counts = outside(outputs, accepted(sample, points, ACCUMULATIONS["undeclared"]))
            assert not any(counts.values()), (case.name, counts)


@pytest.mark.parametrize("case", small_cases(FP32), ids=lambda c: c.name)
def test_declared_fp32_blocks_stay_inside_their_running_bound(case: Case) -> None:
    points, sample = RoundingPoints.contract(FP32), draw(case, "cpu", 3)
    within = accepted(sample, points, ACCUMULATIONS["fp32-blocks-16"])
    for inner in ("sequential", "by size"):
        counts = outside(Emulated(blocks(16, inner=inner), None, points).run(sample), within)
        assert not any(counts.values()), (inner, counts)


@pytest.mark.parametrize("name", ["odd sizes", "wide scales", "sentinels, gates"])
def test_a_declared_chain_of_fused_multiply_adds_stays_inside(name: str) -> None:
    case = next(c for c in small_cases(FP32) if c.name == name)
    points, sample = RoundingPoints.contract(FP32), draw(case, "cpu", 3)
    outputs = Emulated(fused_chain(), None, points).run(sample)
    assert not any(outside(outputs, accepted(sample, points, ACCUMULATIONS["fp32-blocks-1"])).values())


FOREIGN = [
    {"z": False}, {"lora_after_output": True}, {"gates_before_output": True}, {"scaling_in_B": True}
]  # fmt: skip


@pytest.mark.parametrize("flags", FOREIGN, ids=str)
@pytest.mark.parametrize("name", ["odd sizes", "sentinels, gates", "balanced", "scaling one third"])
def test_declared_foreign_rounding_points(flags: dict[str, bool], name: str) -> None:
    case = next(c for c in small_cases(BF16) if c.name == name)
    sample, points = draw(case, "cpu", 4), replace(RoundingPoints.contract(BF16), **flags)
    how = ACCUMULATIONS["undeclared"]
    outputs = Emulated(blocks(32), BF16, points).run(sample)
    assert not any(outside(outputs, accepted(sample, points, how)).values())


def test_undeclared_foreign_rounding_points_are_seen() -> None:
    how = ACCUMULATIONS["tensor-core-sm90"]
    sample = draw(Case("foreign", 2, 128, 64, 24, 2, 16, BF16, data="balanced", scaling=1 / 3, gate_slots=2))
    contract = accepted(sample, RoundingPoints.contract(BF16), how)
    for flags in FOREIGN:
        points = replace(RoundingPoints.contract(BF16), **flags)
        counts = outside(Emulated(blocks(16, inner="fp64"), BF16, points).run(sample), contract)
        assert any(counts.values()), flags


def test_a_thousandth_a_dropped_step_and_a_shifted_scale_fail() -> None:
    sample = draw(Case("dense", 2, 256, 256, 16, 2, 16, BF16))
    points = RoundingPoints.contract(BF16)
    honest = {name: t.value for name, t in vars(forward(sample.problem, points)).items() if t is not None}
    within = accepted(sample, points, ACCUMULATIONS["tensor-core-sm90"])["Y"]
    exact = within.exact

    def share(y: Tensor) -> float:
        y = round_to(y, BF16)
        return float(((y < within.low) | (y > within.high)).double().mean())

    assert share(honest["out"]) == 0
    assert share(exact * 0.999) > 0.1  # one in six bf16 numbers is that near to a rounding boundary
    assert share(exact * 0.99) > 0.9
    broken = Emulated(blocks(16, inner="fp64"), BF16, points, broken="one step dropped").run(sample)["Y"]
    assert share(broken) > 0.9
    weights = sample.problem.expert_weights
    shifted = replace(sample.problem, expert_weights=replace(weights, scales=weights.scales + 1))
    assert share(forward(shifted, points).out.value) > 0.9


def test_fp32_blocks_see_a_thousandth_in_nearly_every_element() -> None:
    sample = draw(Case("dense fp32", 2, 512, 512, 16, 2, 16))
    points = RoundingPoints.contract(FP32)
    running = accepted(sample, points, ACCUMULATIONS["fp32-blocks-64"])["Y"]
    weak = accepted(sample, points, ACCUMULATIONS["undeclared"])["Y"]
    scaled = running.exact * 0.999
    seen = [float(((scaled < i.low) | (scaled > i.high)).double().mean()) for i in (running, weak)]
    assert seen[0] > 0.9
    assert seen[0] > seen[1]


def test_other_chains_are_followed() -> None:
    """LoRA in an accumulator of its own, and the bias ahead of the base product."""
    sample = draw(Case("chains", 2, 96, 64, 12, 2, 16, BF16, data="balanced", bias=True))
    problem, points = sample.problem, RoundingPoints.contract(BF16)
    dot = tensor_core()
    for lora, bias_inside in (("apart", False), ("first", True), ("apart", True)):
        how = replace(ACCUMULATIONS["tensor-core-sm90"], lora=lora, bias_inside=bias_inside)
        within = accepted(sample, points, how)["Y"]
        x, y = expert_order_inputs(problem), torch.zeros(problem.P, problem.N, dtype=torch.float64)
        for e, start, end in problem.segments():
            own, (A, B) = slice(start, end), problem.expert_lora(e)
            zeros, bias = torch.zeros(end - start, problem.N, dtype=torch.float64), problem.expert_biases[e].double()
            z = round_to(dot(torch.zeros(end - start, problem.rank, dtype=torch.float64), x[own], A.T), BF16)
            side = r32(problem.scaling * dot(zeros, z, B.T))
            acc = zeros if lora == "apart" else side
            acc = r32(acc + bias) if bias_inside else acc
            acc = dot(acc, x[own], problem.expert_weight(e))
            acc = r32(acc + side) if lora == "apart" else acc
            y[own] = acc if bias_inside else r32(acc + bias)
        got = round_to(position(problem, y), BF16)
        assert bool(((got >= within.low) & (got <= within.high)).all())


def test_rho_by_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(200, generator=generator).double()
    e = q.abs() * torch.rand(200, generator=generator).double() * 2.0**-6
    moved = q + e * torch.linspace(-1, 1, 501, dtype=torch.float64)[:, None]
    expected = (round_to(moved, BF16) - round_to(q, BF16)).abs().amax(0)
    assert torch.equal(rho(q, e, BF16), expected)
    assert torch.equal(rho(q, e, None), e)


def test_experts_without_rows_and_sentinels_must_be_exactly_zero() -> None:
    case = Case("zeros", 5, 64, 64, 16, 2, 4, BF16, routing="sentinels", bias=True)
    sample = draw(replace(case, routing="empty_experts"))
    within = accepted(sample, RoundingPoints.contract(BF16), ACCUMULATIONS["tensor-core-sm90"])
    for expert in (0, 2, 4):
        for ends in (within["dbias"].low[expert], within["dA"].high[expert * 4 : expert * 4 + 4]):
            assert not ends.any()
    sample = draw(case)
    foreign = sample.problem.row_positions()[sample.problem.sorted_expert_idxs == 5]
    assert len(foreign) > 0
    within = accepted(sample, RoundingPoints.contract(BF16), ACCUMULATIONS["undeclared"])
    assert not within["Y"].low[foreign].any()
    assert not within["Y"].high[foreign].any()
