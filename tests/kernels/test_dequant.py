"""The decode of listed experts, and Strategy A's selection; every code and byte is for the gate's check "decoder"."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mxref import MXWeights, decode_mxfp4, encode_mxfp4
from mxref.formats import pack_codes
from mxref.kernels import dequantize_experts, parallel_linear_lora, selective_lora_weights
from mxref.kernels.device.stack import PackedMatrix


@pytest.fixture
def every_case(device: torch.device) -> MXWeights:
    """All 16 codes at both nibbles under all 256 scale bytes: row n has scale byte n."""
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    return MXWeights(pack_codes(codes), scales, 32, 256).to(device)


@pytest.mark.parametrize(("K", "N"), [(32, 1), (96, 33), (160, 70)])
def test_listed_experts_only(device: torch.device, K: int, N: int) -> None:
    weights = encode_mxfp4(torch.randn(4, N, K)).to(device)
    experts = torch.tensor([2, -1, 0, 4], device=device)
    out = torch.full((4, N, K), 5.0, device=device)
    got = dequantize_experts(weights, experts, torch.float32, out)
    everything = decode_mxfp4(weights, torch.float32)
    assert got is out
    assert torch.equal(got[0], everything[2])
    assert torch.equal(got[2], everything[0])
    assert (got[[1, 3]] == 5.0).all(), "ids outside 0..E-1 must leave their slot alone"


def test_dequantize_errors(every_case: MXWeights) -> None:
    with pytest.raises(TypeError, match=r"dtype is torch\.float64"):
        dequantize_experts(every_case, torch.zeros(1, dtype=torch.int64), torch.float64)
    with pytest.raises(ValueError, match="experts has shape"):
        dequantize_experts(every_case, torch.zeros(1, 1, dtype=torch.int64), torch.float32)
    with pytest.raises(ValueError, match="out is"):
        dequantize_experts(every_case, torch.zeros(1, dtype=torch.int64), torch.float32, torch.zeros(3))


def test_another_layout_is_refused_before_a_kernel_starts(sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = sample().problem
    weights = problem.expert_weights
    object.__setattr__(weights, "layout", 7)
    monkeypatch.setattr("mxref.kernels.device.launch.PreparedLaunch.__call__", None)
    ids = torch.zeros(1, dtype=torch.int64)
    for call in (
        lambda: parallel_linear_lora(**problem.arguments()),
        lambda: dequantize_experts(weights, ids, torch.float32),
        lambda: PackedMatrix.of(weights, torch.float32),
    ):
        with pytest.raises(ValueError, match=r"the weights have layout 7; .* reads FWD"):
            call()


def test_selective_lora_weights() -> None:
    E, r, K, N = 4, 3, 5, 6
    A, B = torch.randn(E * r, K), torch.randn(N, E * r)
    a, b = selective_lora_weights(A, B, torch.tensor([3, 1]), E)
    assert torch.equal(a, torch.cat([A[9:12], A[3:6]]))
    assert torch.equal(b, torch.cat([B[:, 9:12], B[:, 3:6]], 1))
    with pytest.raises(ValueError, match="lora_A has shape"):
        selective_lora_weights(A[:-1], B, torch.tensor([0]), E)
