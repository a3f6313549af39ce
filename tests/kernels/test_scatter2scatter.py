"""The bare products beyond the gate's check of operators: no adapter, rows that fan out, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mxref.kernels import scatter2scatter_lora_dX_mx, scatter2scatter_lora_mx
from mxref.scattermoe import RoundingPoints, backward, forward


def test_dX_without_an_adapter(sample: Any) -> None:
    """With one, every layout is the gate's, by its check "operators"."""
    drawn = sample(routing="sentinels", grouped_out=True, rank=None)
    p, points = drawn.problem, RoundingPoints.exact()
    routing = (p.sorted_expert_idxs, p.sorted_scattered_idxs)
    with torch.no_grad():
        got = scatter2scatter_lora_dX_mx(drawn.grad_out, p.expert_weights, *routing, 1, None, None, 1.0, True, True)
    assert torch.equal(got.double(), backward(p, forward(p, points), drawn.grad_out, points).d.value)


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
