"""How far a sum may lie from the exact one: any order, blocks, tensor cores; held, and nearly reached."""

from __future__ import annotations

import pytest
import torch
from bounded import HONEST
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxref.rounding import round_to
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS, Accumulation, Order
from mxref.verification.arithmetic.accumulator import Accumulator, gamma
from mxref.verification.studies.honest.emulation import (
    blocks,
    r32,
    tensor_core,
)

BF16, FP32 = torch.bfloat16, torch.float32


@settings(max_examples=30)
@given(st.integers(1, 200), st.integers(0, 2**31), st.sampled_from(list(HONEST)), st.integers(0, 40))
def test_any_order_of_any_length_is_inside_gamma(n: int, seed: int, honest: str, spread: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    P, Q = wild(3, n, spread, generator), wild(n, 4, spread, generator)
    accumulator = Accumulator(ACCUMULATIONS["undeclared"], FP32, 3, 4, P.device)
    accumulator.dot(P, Q, "Y")
    got = HONEST[honest](torch.zeros(3, 4, dtype=torch.float64), P, Q)
    assert bool(((got - accumulator.value).abs() <= accumulator.radius()).all())


@settings(max_examples=60)
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


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(0, 2**31), st.sampled_from([2.0**-26, 1 / 3, -0.75, 2.0, 1e5]), st.booleans())
def test_a_factor_may_meet_a_subnormal_operand_before_the_sum(n: int, seed: int, s: float, early: bool) -> None:
    """What is lost there is multiplied by the other operand, and not by the factor."""
    generator = torch.Generator().manual_seed(seed)
    P, Q = round_to(wild(3, n, 0, generator) * 2.0**-132, BF16), wild(n, 4, 6, generator)
    got = (P.float() * s @ Q.float() if early else s * (P.float() @ Q.float())).double()
    accumulator = Accumulator(ACCUMULATIONS["undeclared"], FP32, 3, 4, P.device)
    accumulator.dot(P, Q, "dA")
    accumulator.scale(s)
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


def test_accumulations_are_named_or_described() -> None:
    assert str(ACCUMULATIONS["fp32-blocks-64"]) == "fp32-blocks-64"
    own = Accumulation("fp32_blocks", step=48, lora="apart")
    assert str(own) == "fp32 in blocks of 48, LoRA product apart, bias last"
