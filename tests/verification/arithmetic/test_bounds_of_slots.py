"""Bounds of what is weighted by gates or summed over slots: ties and 16 bits are known, all else is let through."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bounded import accepted, outside

from mxref.rounding import min_exponent, precision_bits, round_to
from mxref.scattermoe import RoundingPoints, backward, expert_order_inputs, forward
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS
from mxref.verification.cases.case import Case
from mxref.verification.cases.draw import draw
from mxref.verification.studies.honest.emulation import (
    Emulated,
    position,
    tensor_core,
    truncated,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


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


def test_what_may_be_infinite_has_bounds_beside_a_factor_of_zero() -> None:
    case = Case("", 4, 64, 64, 150, 2, 16, FP16, FP32, bias=True, gate_slots=2, gate_values="some zero")
    sample = draw(case)
    first = torch.arange(64) == 0
    biases = torch.where(first, 65_520.0, 65_000.0).repeat(4, 1)  # from 65,520 on fp16 rounds to infinity
    sample = sample.changed(sample.grad_out.masked_fill(first, 0.0), expert_biases=biases)
    within = accepted(sample, RoundingPoints.contract(FP16), ACCUMULATIONS["fp32-blocks-64"])
    for name in ("Y", "dgates"):
        known = within[name].exact.isfinite()
        assert known.any()
        assert not (known & within[name].low.isnan()).any()
