"""Buffers beyond 2^31 elements: a 32-bit offset anywhere would reach the wrong row, or fault.

Small integers and one scale byte make every sum exact in bf16, so the few rows that are compared must be equal.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import mxref
from mxref import MXWeights, Problem, flatten_sort_count, kernels

pytestmark = pytest.mark.gpu

LIMIT = 2**31
CHECKED = 48  # rows


def sparse(rows: int, columns: int, device: torch.device) -> Tensor:
    """Four entries ±1 a row, bf16."""
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device=device)
    where = torch.randint(0, columns, (rows, 4), device=device)
    signs = torch.randint(0, 2, (rows, 4), device=device).to(x.dtype) * 2 - 1
    return x.scatter_(1, where, signs)


def draw(E: int, K: int, N: int, experts: Tensor) -> tuple[Problem, Tensor]:
    """A problem of rank 4 for a router's choice [M, 1], and the output's gradient."""
    torch.manual_seed(0)
    device, rank = experts.device, 4
    packed = torch.randint(0, 256, (E, N, K // 2), dtype=torch.uint8, device=device)
    scales = torch.full((E, N, K // 32), 127, dtype=torch.uint8, device=device)

    def factor(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, device=device).to(torch.bfloat16)

    problem = Problem(
        sparse(experts.numel(), K, device),
        MXWeights(packed, scales, K, N),
        1,
        *flatten_sort_count(experts, E),
        factor(E * rank, K),
        factor(N, E * rank),
        0.5,
    )
    return problem, sparse(experts.numel(), N, device)


def expected(problem: Problem, grad_out: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Y and dX of some rows of x, by the golden model on those rows and their experts alone."""
    routed = torch.empty_like(problem.sorted_expert_idxs)
    routed[problem.sorted_scattered_idxs] = problem.sorted_expert_idxs
    active, experts = torch.unique(routed[rows], return_inverse=True)
    A, B = kernels.selective_lora_weights(problem.lora_A, problem.lora_B, active, problem.E)
    assert isinstance(problem.expert_weights, MXWeights)
    x = problem.inputs[rows].detach().requires_grad_()
    few = replace(problem, inputs=x, expert_weights=problem.expert_weights.select(active), lora_A=A, lora_B=B)
    ids, positions, offsets = flatten_sort_count(experts[:, None], active.numel())
    few = replace(few, sorted_expert_idxs=ids, sorted_scattered_idxs=positions, expert_offsets=offsets)
    y = mxref.parallel_linear_lora(**few.arguments())
    (dx,) = torch.autograd.grad(y, x, grad_out[rows])
    return y.detach(), dx


def assert_rows(problem: Problem, grad_out: Tensor, rows: Tensor, fused: bool) -> None:
    x = problem.inputs.requires_grad_()
    y = kernels.parallel_linear_lora(**problem.arguments(), use_fused_dX=fused, use_fused_gather=fused)
    (dx,) = torch.autograd.grad(y, x, grad_out)
    y_expected, dx_expected = expected(problem, grad_out, rows)
    assert torch.equal(y[rows], y_expected)
    assert torch.equal(dx[rows], dx_expected)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_packed_weights(device: torch.device, fused: bool) -> None:
    E, K, N = 66, 8192, 8192
    experts = torch.tensor([0, 31, 32, 33, 63, 64, 65], device=device).repeat(7)[:CHECKED, None]
    problem, grad_out = draw(E, K, N, experts)
    assert problem.expert_weights.packed.numel() > LIMIT
    assert_rows(problem, grad_out, torch.arange(CHECKED, device=device), fused)


def test_output_rows(device: torch.device) -> None:
    """Y and dY beyond 2^31 elements; the rows at the end, the ones around 2^30, and the first."""
    E, K, N = 4, 64, 8192
    M = LIMIT // N + 300
    experts = torch.randint(0, E, (M, 1), device=device)
    problem, grad_out = draw(E, K, N, experts)
    assert grad_out.numel() > LIMIT
    rows = torch.arange(CHECKED, device=device) + torch.tensor([[0], [M // 2], [M - CHECKED]], device=device)
    assert_rows(problem, grad_out, rows.flatten(), fused=True)


def test_inputs(device: torch.device) -> None:
    """X and dX beyond 2^31 elements."""
    E, K, N = 4, 8192, 64
    M = LIMIT // K + 300
    experts = torch.randint(0, E, (M, 1), device=device)
    problem, grad_out = draw(E, K, N, experts)
    assert problem.inputs.numel() > LIMIT
    rows = torch.arange(CHECKED, device=device) + torch.tensor([[0], [M // 2], [M - CHECKED]], device=device)
    assert_rows(problem, grad_out, rows.flatten(), fused=True)
