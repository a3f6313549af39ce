"""torchao parameters in and out, and the weights of the active experts."""

from __future__ import annotations

import builtins
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import nn
from torchao.prototype.mx_formats.mx_tensor import MXTensor

from mxref import decode_mxfp4, encode_mxfp4
from mxref.kernels.models import torchao as interop
from mxref.kernels.models.experts import PackedExperts

FP4 = torch.float4_e2m1fn_x2
W = torch.randn(4, 64, 96, generator=torch.Generator().manual_seed(0))
ACTIVE = torch.tensor([2, 0])


def mx_param(w: torch.Tensor = W, **options: Any) -> nn.Parameter:
    return nn.Parameter(MXTensor.to_mx(w.contiguous(), FP4, **options), requires_grad=False)


def test_is_mxfp4_param() -> None:
    assert interop.is_mxfp4_param(mx_param())
    assert interop.is_mxfp4_param(MXTensor.to_mx(W, FP4))
    assert not interop.is_mxfp4_param(MXTensor.to_mx(W, torch.float8_e4m3fn))
    assert not interop.is_mxfp4_param(nn.Parameter(W))
    assert not interop.is_mxfp4_param(None)


def test_selective_mx_weights_keeps_bytes() -> None:
    parameter = mx_param()
    chosen = interop.selective_mx_weights_fwd(parameter, ACTIVE)
    assert torch.equal(chosen.packed, parameter.qdata[ACTIVE])
    assert torch.equal(chosen.scales, parameter.scale.view(torch.uint8)[ACTIVE])
    assert (chosen.E, chosen.N, chosen.K) == (2, 64, 96)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_expert_weights(dtype: torch.dtype) -> None:
    module = nn.Module()
    module.gate_up_proj = mx_param(W.to(dtype))
    module.down_proj = nn.Parameter(W.to(dtype))
    decoded = MXTensor.to_mx(W.to(dtype), FP4).dequantize(dtype)[ACTIVE]
    assert torch.equal(interop.selective_expert_weights(module, "gate_up_proj", ACTIVE), decoded)
    dense = interop.selective_expert_weights(module, "down_proj", ACTIVE)
    assert torch.equal(dense, W.to(dtype)[ACTIVE])
    assert dense.requires_grad


def test_selective_expert_weights_of_a_transposed_module() -> None:
    module = nn.Module()
    module.is_transposed = True
    module.down_proj = nn.Parameter(W.mT.contiguous())
    assert torch.equal(interop.selective_expert_weights(module, "down_proj", ACTIVE), W[ACTIVE])


def test_selective_expert_weights_of_packed_experts() -> None:
    weights = encode_mxfp4(W)
    module = PackedExperts(weights, encode_mxfp4(W.mT.contiguous()), torch.relu)
    got = interop.selective_expert_weights(module, "gate_up_proj", ACTIVE)
    assert torch.equal(got, decode_mxfp4(weights, torch.bfloat16)[ACTIVE])


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="swizzled"):
        interop.selective_mx_weights_fwd(MXTensor.to_mx(W[0], FP4, is_swizzled_scales=True), torch.tensor([0]))
    with pytest.raises(TypeError, match="float8_e4m3fn"):
        interop.selective_mx_weights_fwd(MXTensor.to_mx(W, torch.float8_e4m3fn), ACTIVE)
    with pytest.raises(TypeError, match="mx_param is Parameter"):
        interop.selective_mx_weights_fwd(nn.Parameter(W), ACTIVE)
    module = nn.Module()
    module.register_buffer("down_proj", torch.zeros(2, 2, 2, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"down_proj is torch\.uint8"):
        interop.selective_expert_weights(module, "down_proj", ACTIVE)
    with pytest.raises(ValueError, match="no weights of that name"):
        interop.selective_expert_weights(module, "up_proj", ACTIVE)


def test_out_and_in_again() -> None:
    weights = encode_mxfp4(W)
    parameter = interop.mxfp4_param(weights)
    assert isinstance(parameter, nn.Parameter)
    assert not parameter.requires_grad
    again = interop.selective_mx_weights_fwd(parameter, torch.arange(4))
    assert torch.equal(again.packed, weights.packed)
    assert torch.equal(again.scales, weights.scales)


@pytest.mark.parametrize("found", [None, "0.9.0"])
def test_without_torchao_the_minimum_is_named(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    def version(name: str) -> str:
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(interop.metadata, "version", version)
    with pytest.raises(ImportError, match=r"torchao >= 0\.17\.0 is needed"):
        interop.mxfp4_param(encode_mxfp4(W))


def test_looking_at_a_parameter_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"import of {name}")

    monkeypatch.setattr(interop.sys, "modules", {})
    monkeypatch.setattr(builtins, "__import__", refuse)
    assert not interop.is_mxfp4_param(W)
