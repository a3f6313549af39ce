"""The layer against the golden model, equal in every bit, on samples that fp32 represents exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import mxref
from mxref import kernels
from mxref.kernels import Config

CASES: dict[str, dict[str, Any]] = {
    "grouped in": {"grouped_in": True, "bias": True},
    "gates, grouped in": {"gates": True, "grouped_in": True},
    "sentinels, gates": {"routing": "sentinels", "gates": True, "bias": True, "k": 3},
    "k 8": {"k": 8, "M": 6, "gates": True},
    "no tokens, gates": {"M": 0, "gates": True},
    "rank 1": {"rank": 1},
    "rank 16": {"rank": 16},
    "rank 128": {"rank": 128},
    "one expert in all": {"E": 1},
}
"""What the gate's small cases do not have."""


def assert_identical(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        assert torch.equal(got[name], value.to(got[name].dtype)), name


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("case", CASES)
def test_equals_golden(sample: Any, case: str, fused: bool) -> None:
    drawn = sample(**CASES[case])
    got = drawn.run(kernels.parallel_linear_lora, use_fused_dX=fused, use_fused_gather=fused)
    assert_identical(got, drawn.run(mxref.parallel_linear_lora))


@pytest.mark.parametrize(("fused_dX", "fused_gather"), [(True, False), (False, True)])
def test_flags_apart(sample: Any, fused_dX: bool, fused_gather: bool) -> None:
    drawn = sample(routing="sentinels", bias=True)
    got = drawn.run(kernels.parallel_linear_lora, use_fused_dX=fused_dX, use_fused_gather=fused_gather)
    assert_identical(got, drawn.run(mxref.parallel_linear_lora))


@pytest.mark.parametrize("config", [Config(16, 32, 32), Config(64, 64, 128)], ids=["small", "large"])
def test_pinned_tilings(sample: Any, config: Config) -> None:
    drawn = sample(routing="sentinels", gates=True, bias=True, M=40)
    got = drawn.run(kernels.parallel_linear_lora, use_fused_dX=True, config=config)
    assert_identical(got, drawn.run(mxref.parallel_linear_lora))


@pytest.mark.parametrize("dense", [False, True])
def test_negatives_that_torch_has_put_off(sample: Any, dense: bool) -> None:
    """Memory holds the opposite numbers, and the tensor says so (`Tensor.is_neg`); kernels read memory."""
    drawn = sample(bias=True, gates=True)
    if dense:  # expanded, so that what is made of them lies otherwise
        weights = mxref.decode_mxfp4(drawn.problem.expert_weights, torch.float32).mT[:1]
        drawn = replace(drawn, problem=replace(drawn.problem, expert_weights=weights.expand(drawn.problem.E, -1, -1)))
    expected = drawn.run(mxref.parallel_linear_lora)
    drawn.run(kernels.parallel_linear_lora)  # what is known of such a call may not be taken for the next
    put_off = {
        name: torch._neg_view(-x) for name, x in drawn.problem.arguments().items()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    }  # fmt: skip
    assert put_off["inputs"].is_neg()
    put_off = replace(drawn, problem=replace(drawn.problem, **put_off), grad_out=torch._neg_view(-drawn.grad_out))
    assert_identical(put_off.run(kernels.parallel_linear_lora), expected)


@pytest.mark.parametrize("contiguous", ["K", "N"])
def test_dense_weights_of_any_strides(sample: Any, contiguous: str) -> None:
    drawn = sample(bias=True, gates=True)
    dense = mxref.decode_mxfp4(drawn.problem.expert_weights, torch.float32).mT
    dense = dense.contiguous() if contiguous == "N" else dense
    got = drawn.run(kernels.parallel_linear_lora, expert_weights=dense)
    assert_identical(got, drawn.run(mxref.parallel_linear_lora))


def test_strategy_a(sample: Any) -> None:
    """Decode the active experts, renumber, and take the dense path."""
    drawn = sample(E=5, routing="empty")
    p = drawn.problem
    active = mxref.get_active_experts(p.sorted_expert_idxs, p.E)
    dense = kernels.dequantize_experts(p.expert_weights, active, torch.float32).mT
    ids, offsets = mxref.remap_expert_indices(p.sorted_expert_idxs, p.expert_offsets, active, p.E)
    with torch.no_grad():
        A, B = kernels.selective_lora_weights(p.lora_A, p.lora_B, active, p.E)
        y = kernels.parallel_linear_lora(p.inputs, dense, p.k, ids, p.sorted_scattered_idxs, offsets, A, B, p.scaling)
    assert active.numel() < p.E
    assert torch.equal(y, drawn.run(mxref.parallel_linear_lora)["y"])
