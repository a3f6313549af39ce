"""Strategy A: decode only the experts that are used, into dense weights; and the matching choice of adapters."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxref.kernels.decode import load_mxfp4_tile, narrow
from mxref.kernels.launch import architecture, launch
from mxref.kernels.schedule import Routing
from mxref.weights import MXWeights

__all__ = ["active_or_sentinel", "dequantize_experts", "selective_lora_weights"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def dequantize_kernel(
    out, packed, scales, experts, E, N, K, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One program decodes BLOCK_N x BLOCK_K weights of one listed expert; a listed id outside 0..E−1 is skipped."""
    blocks_n, blocks_k = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    block = tl.program_id(0) % (blocks_n * blocks_k)
    slot = (tl.program_id(0) // (blocks_n * blocks_k)).to(tl.int64)
    expert = tl.load(experts + slot).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return
    n = (block // blocks_k) * BLOCK_N + tl.arange(0, BLOCK_N)
    k0 = (block % blocks_k) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    w = load_mxfp4_tile(packed, scales, expert, n, k0, N, K, DTYPE, BLOCK_N, BLOCK_K)
    tl.store(
        out + (slot * N + n[:, None]) * K + k[None, :],
        narrow(w, DTYPE),
        mask=(n < N)[:, None] & (k < K)[None, :],
    )


def dequantize_experts(weights: MXWeights, experts: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Decode the listed experts, bit for bit as `decode_mxfp4` does, also under the interpreter.

    Args:
        weights: the packed stack.
        experts: integer [a], expert ids in any order. The slot of an id outside 0..E−1 is left as it is, so that a
            list of static length can mark what to leave out without a host synchronisation.
        dtype: bf16, fp16 or fp32.
        out: contiguous [a, N, K] of `dtype` to fill; a fresh, uninitialised one by default.

    Returns:
        [a, N, K]; its transpose(1, 2) is what `parallel_linear_lora` takes as dense weights.

    Raises:
        TypeError: `dtype` is none of the three.
        ValueError: `experts` is not one-dimensional, or `out` does not fit.
    """
    if dtype not in _DTYPES:
        raise TypeError(f"dtype is {dtype}; expected one of {', '.join(str(d) for d in _DTYPES)}")
    if experts.ndim != 1:
        raise ValueError(f"experts has shape {tuple(experts.shape)}; expected [a], a list of expert ids")
    shape = (experts.numel(), weights.N, weights.K)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=weights.device)
    elif out.shape != shape or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}; expected contiguous {dtype} {shape}")
    architecture(weights.device)
    launch(
        dequantize_kernel,
        experts.numel() * triton.cdiv(weights.N, 32) * triton.cdiv(weights.K, 128),
        num_warps=4,
        num_stages=1,
        out=out,
        packed=weights.packed,
        scales=weights.scales,
        experts=experts.to(weights.device),
        E=weights.E,
        N=weights.N,
        K=weights.K,
        DTYPE={torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype],
        BLOCK_N=32,
        BLOCK_K=128,
    )
    return out


def active_or_sentinel(routing: Routing) -> Tensor:
    """Expert ids 0..E−1, with E in place of each that owns no rows: int64 [E], made without a synchronisation."""
    counts = torch.diff(routing.offsets, prepend=routing.offsets.new_zeros(1))
    ids = torch.arange(routing.E, device=routing.offsets.device)
    return torch.where(counts > 0, ids, routing.E)


def selective_lora_weights(lora_A: Tensor, lora_B: Tensor, active: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The adapters of the listed experts, in the given order, differentiable.

    Args:
        lora_A: [E·r, K].
        lora_B: [N, E·r].
        active: integer [a], expert ids in 0..E−1.
        num_experts: E.

    Returns:
        lora_A [a·r, K] and lora_B [N, a·r].

    Raises:
        ValueError: the adapters' shapes do not fit each other or E.
    """
    rows = lora_A.shape[0]
    if rows % num_experts or lora_B.shape[1] != rows:
        raise ValueError(
            f"lora_A has shape {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}; expected [E·r, K] and [N, E·r] "
            f"with E = {num_experts}"
        )
    A = lora_A.unflatten(0, (num_experts, rows // num_experts))[active]
    B = lora_B.unflatten(1, (num_experts, rows // num_experts))[:, active]
    return A.flatten(0, 1), B.flatten(1, 2)
