"""The bare products: every grouping, buffers given by the caller, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mxref
from mxref.kernels import scatter2scatter_lora_dX_mx, scatter2scatter_lora_mx
from mxref.scattermoe import RoundingPoints, backward, forward


def by_position(problem: mxref.Problem, rows: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(rows)
    out[problem.row_positions()] = rows
    return out


@pytest.mark.parametrize("x_grouped", [False, True])
@pytest.mark.parametrize("y_grouped", [False, True])
def test_forward(sample: Any, x_grouped: bool, y_grouped: bool) -> None:
    p = sample(routing="sentinels", bias=True, grouped_in=x_grouped, grouped_out=y_grouped).problem
    out = torch.full((p.P, p.N), torch.nan, device=p.device)
    with torch.no_grad():
        got = scatter2scatter_lora_mx(
            p.inputs, p.expert_weights, p.sorted_expert_idxs, p.sorted_scattered_idxs, p.k, p.lora_A, p.lora_B,
            p.scaling, p.expert_biases, x_grouped, y_grouped, out,
        )  # fmt: skip
    assert got is out
    assert torch.equal(got.double(), forward(p, RoundingPoints.exact()).out.value)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dy_grouped", [False, True])
@pytest.mark.parametrize("dx_grouped", [False, True])
def test_dX(sample: Any, dy_grouped: bool, dx_grouped: bool, lora: bool) -> None:
    drawn = sample(routing="sentinels", grouped_out=dy_grouped, rank=3 if lora else None)
    p, points = drawn.problem, RoundingPoints.exact()
    d = backward(p, forward(p, points), drawn.grad_out, points).d.value
    with torch.no_grad():
        got = scatter2scatter_lora_dX_mx(
            drawn.grad_out, p.expert_weights, p.sorted_expert_idxs, p.sorted_scattered_idxs, 1, p.lora_A, p.lora_B,
            p.scaling, dy_grouped, dx_grouped,
        )  # fmt: skip
    assert torch.equal(got.double(), d if dx_grouped else by_position(p, d))


def test_dX_fans_out(sample: Any) -> None:
    """One row of DY feeds the k routed rows of its token."""
    drawn = sample(k=2)
    p = drawn.problem
    token_rows = drawn.grad_out[: p.inputs.shape[0]]
    tail = (p.expert_weights, p.sorted_expert_idxs, p.sorted_scattered_idxs)
    with torch.no_grad():
        got = scatter2scatter_lora_dX_mx(token_rows, *tail, 2, p.lora_A, p.lora_B, p.scaling, dy_grouped=False)
        expected = scatter2scatter_lora_dX_mx(
            token_rows.repeat_interleave(2, 0), *tail, 1, p.lora_A, p.lora_B, p.scaling, dy_grouped=False
        )
    assert torch.equal(got, expected)


def test_errors_name_the_argument(sample: Any) -> None:
    drawn = sample()
    p = drawn.problem
    routing = (p.sorted_expert_idxs, p.sorted_scattered_idxs)
    x = p.inputs.detach()
    with pytest.raises(TypeError, match="W_mx is Tensor"):
        scatter2scatter_lora_mx(x, x, *routing, p.k, None, None, 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sorted_expert_idxs is not a tensor of one dimension"):
        scatter2scatter_lora_mx(x, p.expert_weights, routing[0][None], routing[1], p.k, None, None, 1.0)
    with pytest.raises(ValueError, match=r"out is torch\.float32"):
        scatter2scatter_lora_mx(x, p.expert_weights, *routing, p.k, None, None, 1.0, out=x)
    with pytest.raises(ValueError, match="DY has shape"):
        scatter2scatter_lora_dX_mx(x, p.expert_weights, *routing, 1, None, None, 1.0)
    with pytest.raises(ValueError, match="k is 2 with dy_grouped"):
        scatter2scatter_lora_dX_mx(drawn.grad_out, p.expert_weights, *routing, 2, None, None, 1.0)
