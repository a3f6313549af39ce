"""Bounds hold for everything honest and for nothing else.

Honest arithmetic is emulated, independently of the code under test; see `studies.conforming.emulation`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judging import integers, quick
from torch import Tensor

from mxref.rounding import min_exponent, precision_bits, round_to
from mxref.scattermoe import RoundingPoints, backward, expert_order_inputs, forward
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS, Accumulation, Order
from mxref.verification.arithmetic.accumulator import Accumulator, gamma
from mxref.verification.arithmetic.bounds import intervals
from mxref.verification.arithmetic.interval import Interval, rho
from mxref.verification.cases.case import Case, Sample
from mxref.verification.cases.draw import draw
from mxref.verification.studies.conforming.emulation import (
    Dot,
    Emulated,
    blocks,
    fused_chain,
    position,
    r32,
    tensor_core,
    truncated,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

HONEST: dict[str, Dot] = {
    **{f"blocks of {b}, {o}, {i}": blocks(b, o, i)
       for b in (8, 16, 64) for o in ("forward", "backward", "shuffled") for i in ("sequential", "pairwise")},
    "one block, pairwise": blocks(4096, inner="pairwise"),
    "one block, largest first": blocks(4096, inner="by size"),
    "one block, fp64": blocks(4096, inner="fp64"),
    "fused chain": fused_chain(),
    "fused chain, backward": fused_chain("backward"),
}  # fmt: skip


def accepted(sample: Sample, points: RoundingPoints, how: Accumulation) -> dict[str, Interval]:
    fwd = forward(sample.problem, points)
    return intervals(
        sample.problem, fwd, backward(sample.problem, fwd, sample.grad_out, points), sample.grad_out, points, how
    )


def outside(outputs: dict[str, Tensor], within: dict[str, Interval]) -> dict[str, int]:
    assert outputs.keys() == within.keys()
    return {
        name: int(((outputs[name] < interval.low) | (outputs[name] > interval.high)).sum())
        for name, interval in within.items()
    }


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


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(0, 2**31), st.sampled_from(list(HONEST)), st.integers(0, 40))
def test_any_order_of_any_length_is_inside_gamma(n: int, seed: int, honest: str, spread: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    P, Q = wild(3, n, spread, generator), wild(n, 4, spread, generator)
    accumulator = Accumulator(ACCUMULATIONS["undeclared"], FP32, 3, 4, P.device)
    accumulator.dot(P, Q, "Y")
    got = HONEST[honest](torch.zeros(3, 4, dtype=torch.float64), P, Q)
    assert bool(((got - accumulator.value).abs() <= accumulator.radius()).all())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 100), st.integers(0, 2**31), st.sampled_from([(16, 25), (8, 24)]), st.integers(0, 60))
def test_running_bound_of_tensor_cores_on_wild_operands(n: int, seed: int, arch: tuple[int, int], spread: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    P, Q = round_to(wild(3, n, spread, generator), BF16), round_to(wild(n, 4, spread, generator), BF16)
    dot, zeros = tensor_core(*arch), torch.zeros(3, 4, dtype=torch.float64)
    got = dot(r32(-0.75 * dot(zeros, P, Q)), P, Q.flip(1))
    for how in (Accumulation("tensor_core", *arch), ACCUMULATIONS["undeclared"]):
        accumulator = Accumulator(how, BF16, 3, 4, P.device)
        accumulator.dot(P, Q)
        accumulator.scale(-0.75)
        accumulator.dot(P, Q.flip(1), "Y")
        assert bool(((got - accumulator.value).abs() <= accumulator.radius()).all())


def wild(rows: int, columns: int, spread: int, generator: torch.Generator) -> Tensor:
    """Magnitudes over 2^±spread, a tenth zeros, in fp32."""
    x = torch.randn(rows, columns, generator=generator).double()
    exponents = torch.randint(-spread, spread + 1, (rows, columns), generator=generator).double()
    keep = torch.rand(rows, columns, generator=generator) > 0.1
    return r32(x * torch.exp2(exponents) * keep)


@pytest.mark.parametrize("kind", ["tensor_core", "fp32_blocks"])
def test_split_k_and_permuted_orders_are_followed(kind: str) -> None:
    generator = torch.Generator().manual_seed(7)
    P, Q = round_to(wild(5, 200, 3, generator), BF16), round_to(wild(200, 6, 3, generator), BF16)
    dot = tensor_core() if kind == "tensor_core" else blocks(16)
    evens_first = torch.cat((torch.arange(0, 200, 2), torch.arange(1, 200, 2)))
    how = Accumulation(kind, 16, orders={"Y": Order(lambda n: evens_first, parts=3)})  # type: ignore[arg-type]
    accumulator = Accumulator(how, BF16, 5, 6, P.device)
    accumulator.dot(P, Q, "Y")
    zeros, total = torch.zeros(5, 6, dtype=torch.float64), torch.zeros(5, 6, dtype=torch.float64)
    for own in evens_first.split(80):
        total = r32(total + dot(zeros, P[:, own], Q[own]))
    assert torch.allclose(accumulator.value, P @ Q, rtol=1e-12)
    assert bool(((total - accumulator.value).abs() <= accumulator.radius()).all())


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


def test_gamma_grows_and_refuses_what_it_cannot_bound() -> None:
    assert gamma(1) == pytest.approx(2.0**-24)
    assert gamma(1000) > 1000 * 2.0**-24
    with pytest.raises(ValueError, match=r"n·u < 1"):
        gamma(2**24)


@pytest.mark.parametrize(("step", "fraction_bits"), [(16, 25), (8, 24)])
def test_the_running_bound_of_tensor_cores_is_nearly_reached(step: int, fraction_bits: int) -> None:
    """One 1, then products that lose nearly a unit in alignment, their sum nearly one in the output."""
    P, Q = torch.ones(1, 40 * step, dtype=torch.float64), torch.zeros(40 * step, 1, dtype=torch.float64)
    Q[:] = 2.0**-fraction_bits * (2 - 2.0**-7)
    Q[::step] = 0
    Q[0] = 1
    accumulator = Accumulator(Accumulation("tensor_core", step, fraction_bits), BF16, 1, 1, P.device)
    accumulator.dot(P, Q, "Y")
    lost = accumulator.value - tensor_core(step, fraction_bits)(torch.zeros(1, 1, dtype=torch.float64), P, Q)
    assert 0.7 < float(lost / accumulator.radius()) <= 1


@pytest.mark.parametrize("step", [1, 16])
def test_the_running_bound_of_fp32_blocks_is_nearly_reached(step: int) -> None:
    """One 1, then blocks of just under half an ulp, each of which the accumulator rounds away."""
    P, Q = torch.ones(1, 400 * step, dtype=torch.float64), torch.zeros(400 * step, 1, dtype=torch.float64)
    Q[::step] = 2.0**-24 * (1 - 2.0**-7)
    Q[0] = 1
    accumulator = Accumulator(Accumulation("fp32_blocks", step), FP32, 1, 1, P.device)
    accumulator.dot(P, Q, "Y")
    lost = accumulator.value - blocks(step)(torch.zeros(1, 1, dtype=torch.float64), P, Q)
    assert 0.8 < float(lost / accumulator.radius()) <= 1


def test_gates_let_through_every_y_that_is_accepted() -> None:
    """Y at the ends of its interval, all on the same side: what the gates make of it must be accepted too."""
    case = Case("gated", 2, 256, 64, 12, 2, 16, BF16, data="balanced", gate_slots=2)
    sample, points, how = draw(case), RoundingPoints.contract(BF16), ACCUMULATIONS["undeclared"]
    problem = sample.problem
    bare = replace(sample, problem=replace(problem, gates=None), grad_out=torch.zeros(24, 64, dtype=BF16))
    rows, within = accepted(bare, points, how)["Y"], accepted(sample, points, how)
    gates, incoming = problem.gates.double().flatten()[:, None], sample.grad_out.double().repeat_interleave(2, 0)
    for end, other in ((rows.high, rows.low), (rows.low, rows.high)):
        out = round_to((gates * end).view(12, 2, 64).sum(1), BF16)
        dgates = round_to((torch.where(incoming > 0, end, other) * incoming).sum(1).view(12, 2), BF16)
        assert not any(outside({"Y": out, "dgates": dgates}, {k: within[k] for k in ("Y", "dgates")}).values())


def test_the_rounding_of_gated_gradients_reaches_every_sum_over_them() -> None:
    case = Case("gated", 2, 64, 64, 12, 2, 16, FP32, gate_slots=2, bias=True)
    sample, points, how = draw(case), RoundingPoints.contract(FP32), ACCUMULATIONS["fp32-blocks-16"]
    problem = sample.problem
    dy = backward(problem, forward(problem, points), sample.grad_out, points).dy.value
    bare = replace(sample, problem=replace(problem, gates=None, grouped_out=True), grad_out=dy)
    gated, known = accepted(sample, points, how), accepted(bare, points, how)
    added = {
        name: (gated[name].high - gated[name].low) / 2 - (known[name].high - known[name].low) / 2
        for name in known
        if name != "Y"
    }
    through = torch.zeros(problem.P, problem.K, dtype=torch.float64)
    for e, start, end in problem.segments():
        rows, (_, B), own = slice(start, end), problem.expert_lora(e), slice(e * 16, e * 16 + 16)
        through[rows] = dy[rows].abs() @ problem.expert_weight(e).T.abs()
        least = 2.0**-24 * problem.scaling * (B.abs().T @ dy[rows].abs().T @ expert_order_inputs(problem)[rows].abs())
        assert bool((added["dA"][own] >= 0.99 * least).all())
        assert bool((added["dbias"][e] >= 0.99 * 2.0**-24 * dy[rows].abs().sum(0)).all())
    least = 2.0**-24 * position(problem, through).view(12, 2, 64).sum(1)
    assert bool((added["dX"] >= 0.99 * least).all())


@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [(BF16, (*range(-152, -130), -126, 0, *range(108, 114))), (FP16, (-36, -35, -24, -14, -6))],
    ids=str,
)
def test_two_16_bit_numbers_have_one_rounded_product(dtype: torch.dtype, exponents: tuple[int, ...]) -> None:
    """Of every two mantissas, where products leave a range and between: whoever multiplies, and however."""
    least, integers = min_exponent(dtype) - precision_bits(dtype) + 1, torch.arange(2 ** precision_bits(dtype)).double()
    for exponent in exponents:
        of_gates = max(least, exponent - 5)
        gates, dOut = integers[:, None] * 2.0**of_gates, integers * 2.0 ** (exponent - of_gates)
        g, d, zero = gates.to(dtype), dOut.to(dtype), torch.zeros(())
        assert torch.equal(g.double(), gates)
        assert torch.equal(d.double(), dOut)
        once = round_to(gates * dOut, dtype)
        cut = truncated(gates * dOut, torch.tensor(2.0**-149).double())  # as a tensor core cuts its result
        wide = (g.float() * d.float(), torch.addcmul(zero, d.float(), g.float()), gates * dOut, cut)
        for product in (g * d, d * g, *wide):
            assert torch.equal(product.to(dtype).double(), once)


def test_gated_gradients_in_16_bits_are_known_to_the_bit() -> None:
    """A tie of gate·dOut that is rounded to the odd neighbour shows in whatever is made of dY."""
    case, how = Case("gated", 6, 64, 32, 12, 2, 4, BF16, gate_slots=2, bias=True), ACCUMULATIONS["tensor-core-sm90"]
    sample, points = draw(case), RoundingPoints.contract(BF16)
    problem, within = sample.problem, accepted(sample, points, how)
    dy = backward(problem, forward(problem, points), sample.grad_out, points).dy
    odd = 2 * dy.exact - dy.value
    odd = torch.where(odd == round_to(odd, BF16), odd, dy.value)
    assert bool((odd != dy.value).any())
    for value, seen in ((dy.value, False), (odd, True)):
        bare = replace(sample, problem=replace(problem, gates=None, grouped_out=True), grad_out=value.to(BF16))
        outputs = Emulated(tensor_core(), BF16, points).run(bare)
        made = ("dX", "dA", "dB", "dbias")
        counts = outside({name: outputs[name] for name in made}, {name: within[name] for name in made})
        assert [bool(count) for count in counts.values()] == [seen] * 4


def test_a_sum_of_two_rows_on_a_tie_goes_to_the_even_neighbour() -> None:
    """Two rows of D in 16 bits have an exact sum in fp32, which lies half between two numbers every fourth time."""
    case, points = Case("slots", 4, 128, 64, 32, 2, 8, BF16, data="balanced"), RoundingPoints.contract(BF16)
    sample = draw(case)
    dX = backward(sample.problem, forward(sample.problem, points), sample.grad_out, points).dx
    within = accepted(sample, points, ACCUMULATIONS["tensor-core-sm90"])["dX"]
    odd = 2 * dX.exact - dX.value
    ties = (odd == round_to(odd, BF16)) & (odd != dX.value)
    assert float(ties.double().mean()) > 0.1
    assert not bool(((dX.value < within.low) | (dX.value > within.high)).any())
    seen = (odd < within.low) | (odd > within.high)
    assert float(seen[ties].double().mean()) > 0.9, "but for the rows that may themselves round otherwise"


def test_accumulations_are_named_or_described() -> None:
    assert str(ACCUMULATIONS["fp32-blocks-64"]) == "fp32-blocks-64"
    own = Accumulation("fp32_blocks", step=48, lora="apart")
    assert str(own) == "fp32 in blocks of 48, LoRA product apart, bias last"
