"""Integer fixtures: exact in any order of summation."""

from __future__ import annotations

import pytest
import torch
from judging import integers

from mxref.scattermoe import RoundingPoints, expert_order_inputs
from mxref.verification.cases.case import Case
from mxref.verification.cases.draw import draw
from mxref.verification.cases.integer import is_exact_everywhere


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
    generator = torch.Generator().manual_seed(seed)
    for e, start, end in problem.segments():
        W, (A, B) = problem.expert_weight(e).float(), (t.float() for t in problem.expert_lora(e))
        z = x[start:end].double() @ A.double().T
        exact = x[start:end].double() @ W.double() + problem.scaling * (z @ B.double().T)
        operands = torch.cat((W, problem.scaling * (A.T @ B.T))), torch.cat((x[start:end], x[start:end]), 1)
        for _ in range(5):
            total = torch.zeros(end - start, problem.N)
            for k in torch.randperm(2 * problem.K, generator=generator).tolist():
                total = total + operands[1][:, k, None] * operands[0][None, k]
            assert torch.equal(total.double(), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_over_many_gates_can_be_exact(dtype: torch.dtype) -> None:
    """One expert's bias goes into an output 37 times, under gates of up to 2."""
    case = Case("many gates", 1, 32, 5760, 37, 3, 3, dtype, data="integer", bias=True, gate_slots=37, grouped_in=True,
                routing="one_expert")  # fmt: skip
    assert int(draw(case).problem.expert_biases.abs().count_nonzero()) > 3000


def test_sums_over_many_slots_of_thousands_of_columns_can_be_exact() -> None:
    """A row of x goes into an output 17 times, through other weights and an adapter each time."""
    case = Case("triples 2058 02b4", 4, 64, 5760, 37, 17, 8, data="integer", scaling=-2.0, gate_slots=17)
    assert draw(case).problem.inputs.any()


def test_sums_of_an_expert_that_a_token_names_many_times_can_be_exact() -> None:
    """Its product with a row of x goes into an output each time: sums of all codes need more bits than bf16's."""
    case = Case("pairs 163 84ca", 7, 64, 264, 1, 22, 48, torch.bfloat16, data="integer", scaling=0.25, bias=True,
                gate_slots=22, routing="empty_experts")  # fmt: skip
    assert draw(case).problem.inputs.any()


def test_integer_data_that_cannot_be_exact_is_refused() -> None:
    with pytest.raises(ValueError, match="no draw is exact"):
        draw(Case("a third", 1, 32, 32, 8, 1, 4, data="integer", scaling=1 / 3))
