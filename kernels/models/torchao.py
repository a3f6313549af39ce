"""torchao's MXFP4 parameters in and out, and the weights of active experts.

A torchao `MXTensor` with FP4 elements has the bytes of `MXWeights`, so conversions are views. torchao is optional and
never imported to look at a tensor.
"""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from mxref.kernels.device.dequant import dequantize_experts
from mxref.weights import MXLayout, MXWeights

TORCHAO_MINIMUM = Version("0.17.0")
"""The oldest torchao that supports the oldest torch this project supports (2.11)."""

_MX_MODULE = "torchao.prototype.mx_formats.mx_tensor"


def is_mxfp4_param(p: Any) -> bool:
    """Whether `p` is a torchao `MXTensor`, or a parameter that holds one, with FP4 (E2M1) elements."""
    return _is_mx_tensor(p) and p.elem_dtype == torch.float4_e2m1fn_x2


def selective_mx_weights_fwd(mx_param: Any, active: Tensor) -> MXWeights:
    """The packed weights of the listed experts, copied byte for byte.

    Args:
        mx_param: a torchao `MXTensor` [E, N, K] with FP4 elements and plain scales, or a parameter that holds one.
        active: integer [a], expert ids in 0..E−1.

    Raises:
        TypeError: `mx_param` is no MXTensor, or has other elements.
        ValueError: its scales are swizzled, its blocks are not of 32, it is transposed, or `active` does not fit.
    """
    return MXWeights.from_torchao(_held(mx_param)).select(active)


def selective_expert_weights(module: nn.Module, name: str, active: Tensor) -> Tensor:
    """The dense weights of the listed experts, decoded if they are packed.

    Args:
        module: an experts module; with `is_transposed = True` its dense weights are [E, K, N].
        name: of its weights: an `MXTensor` parameter, a dense parameter, or a projection of `PackedExperts`.
        active: integer [a], expert ids in 0..E−1.

    Returns:
        [a, N, K] in the dtype that the weights were quantised from, or that of the dense parameter, differentiable.

    Raises:
        TypeError: the parameter holds elements that are neither floating point nor MXFP4, or `active` no integers.
        ValueError: `module` has no weights of that name, they are not a stack of matrices, or `active` does not fit.
    """
    packed = getattr(module, "packed_weights", None)
    if packed is not None:
        return _decode(packed(name).select(active))
    parameter = getattr(module, name, None)
    if not isinstance(parameter, Tensor):
        raise ValueError(f"name is {name!r}; {type(module).__name__} has no weights of that name")
    if _is_mx_tensor(parameter):
        return _decode(selective_mx_weights_fwd(parameter, active))
    if not parameter.is_floating_point() or parameter.element_size() < 2:
        raise TypeError(f"{name} is {parameter.dtype}; expected bf16, fp16 or fp32 weights, or a torchao MXTensor")
    if parameter.ndim != 3:
        raise ValueError(f"{name} has shape {tuple(parameter.shape)}; expected a stack of matrices, one an expert")
    _check_active(active, parameter.shape[0])
    chosen = parameter[active.to(parameter.device)]
    return chosen.mT if getattr(module, "is_transposed", False) else chosen


def mxfp4_param(weights: MXWeights) -> nn.Parameter:
    """A frozen parameter that holds a torchao `MXTensor` [E, N, K] over the same bytes.

    Raises:
        ImportError: torchao is missing or too old.
        TypeError: `weights` is no MXWeights.
    """
    if not isinstance(weights, MXWeights):
        raise TypeError(f"weights is {type(weights).__name__}; expected MXWeights")
    require_torchao()
    return nn.Parameter(weights.to_torchao(), requires_grad=False)


def require_torchao() -> None:
    """Raise ImportError, which names the version needed, unless torchao is there."""
    needed = f"torchao >= {TORCHAO_MINIMUM} is needed for MXTensor: pip install 'torchao>={TORCHAO_MINIMUM}'"
    try:
        found = Version(metadata.version("torchao"))
    except metadata.PackageNotFoundError:
        raise ImportError(f"torchao is not installed; {needed}") from None
    if found < TORCHAO_MINIMUM:
        raise ImportError(f"torchao {found} is installed; {needed}")


def _is_mx_tensor(p: Any) -> bool:
    module = sys.modules.get(_MX_MODULE)
    return module is not None and isinstance(p, module.MXTensor)


def _held(p: Any) -> Any:
    if not _is_mx_tensor(p):
        raise TypeError(f"mx_param is {type(p).__name__}; expected a torchao MXTensor or a parameter that holds one")
    return p


def _check_active(active: Tensor, experts: int) -> None:
    if active.is_floating_point() or active.dtype == torch.bool:
        raise TypeError(f"active is {active.dtype}; expected integer expert ids")
    if active.ndim != 1:
        raise ValueError(f"active has shape {tuple(active.shape)}; expected [a], a list of expert ids")
    if active.device.type == "cpu" and active.numel() and not 0 <= int(active.min()) <= int(active.max()) < experts:
        raise ValueError(f"active holds ids {int(active.min())}..{int(active.max())}; expected 0..{experts - 1}")


def _decode(weights: MXWeights) -> Tensor:
    plain = weights.repack(MXLayout.FWD)
    return dequantize_experts(plain, torch.arange(plain.E, device=plain.device), plain.orig_dtype)
