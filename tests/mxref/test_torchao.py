"""MXWeights from and to torchao's MXTensor."""

from __future__ import annotations

import pytest
import torch

from mxref.weights import MXWeights, decode_mxfp4, encode_mxfp4

mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
MXTensor = mx_tensor.MXTensor
FP4 = torch.float4_e2m1fn_x2
W = torch.randn(3, 128, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("w", [W, W[0]], ids=["stack", "matrix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_torchao_keeps_bytes_and_values(w, dtype):
    mx = MXTensor.to_mx(w.to(dtype).contiguous(), FP4)
    weights = MXWeights.from_torchao(mx)
    assert weights.packed.data_ptr() == mx.qdata.data_ptr()
    assert (weights.E, weights.N, weights.K, weights.orig_dtype) == (w[..., 0, 0].numel(), 128, 96, dtype)
    assert torch.equal(decode_mxfp4(weights, dtype).view_as(w), mx.dequantize(dtype))


def test_to_torchao_keeps_bytes_and_values():
    weights = encode_mxfp4(W)
    mx = weights.to_torchao()
    assert mx.shape == W.shape
    assert mx.qdata.data_ptr() == weights.packed.data_ptr()
    assert torch.equal(mx.dequantize(torch.float32), decode_mxfp4(weights, torch.float32))


def test_round_trip():
    weights = encode_mxfp4(W, "even")
    again = MXWeights.from_torchao(weights.to_torchao())
    assert torch.equal(again.packed, weights.packed)
    assert torch.equal(again.scales, weights.scales)
    assert again.orig_dtype == weights.orig_dtype


def test_swizzled_scales_are_refused_by_name():
    mx = MXTensor.to_mx(W[0], FP4, is_swizzled_scales=True)
    with pytest.raises(ValueError, match="swizzled"):
        MXWeights.from_torchao(mx)


def test_a_transposed_tensor_is_refused():
    with pytest.raises(ValueError, match="undo the transposition"):
        MXWeights.from_torchao(MXTensor.to_mx(W[0], FP4).t())


def test_another_block_size_is_refused():
    with pytest.raises(ValueError, match="block_size is 16"):
        MXWeights.from_torchao(MXTensor.to_mx(W[0], FP4, block_size=16))


def test_other_elements_and_other_types_are_refused():
    with pytest.raises(TypeError, match="float8_e4m3fn"):
        MXWeights.from_torchao(MXTensor.to_mx(W[0], torch.float8_e4m3fn))
    with pytest.raises(TypeError, match="mx is Tensor"):
        MXWeights.from_torchao(W)
