"""Strategy A: decode only the experts that are used, into dense weights; and the matching choice of adapters."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxref.kernels.device.decode import BLOCK, e2m1, e8m0, narrow
from mxref.kernels.device.launch import INTERPRETED, PreparedLaunch, aligned, architecture, kinds, stream_of
from mxref.kernels.device.schedule import Routing
from mxref.weights import MXLayout, MXWeights

__all__ = ["active_or_sentinel", "dequantize_experts", "selective_lora_weights"]

PROGRAMS = 8 if INTERPRETED else 8192
"""Whatever is to be decoded: several times what a GPU holds at once, since programs do not advance evenly."""

WORDS = 1024
"""32-bit words of packed weights in a chunk."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def dequantize_kernel(
    out,
    words,
    scales,
    experts,
    slots,
    E,
    size,
    DTYPE: tl.constexpr,
    WORDS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """The programs share the chunks of the listed experts in turn; a slot whose id is outside 0..E−1 has none.

    An expert's `size` = N·K weights lie one after another, eight to a word and BLOCK to a scale byte, in the order
    of the output: the matrix's shape does not matter. A chunk is WORDS words. `slots` ids are listed, SLOTS ≥ slots.
    """
    slot = tl.arange(0, SLOTS)
    listed = tl.load(experts + slot, mask=slot < slots, other=-1)
    used = tl.cumsum(((listed >= 0) & (listed < E)).to(tl.int32))
    chunks = tl.cdiv(size, WORDS * 8)
    for chunk in range(tl.program_id(0), tl.max(used) * chunks, tl.num_programs(0)):
        place = tl.sum((used <= chunk // chunks).to(tl.int64))  # slots up to the chunk's own
        expert = tl.load(experts + place).to(tl.int64)
        word = (chunk % chunks).to(tl.int64) * WORDS + tl.arange(0, WORDS)
        inside = word < size // 8
        codes = tl.load(words + expert * (size // 8) + word, mask=inside, other=0)
        scale = tl.load(scales + expert * (size // BLOCK) + word // (BLOCK // 8), mask=inside, other=0)
        nibbles = (codes[:, None] >> (4 * tl.arange(0, 8))[None, :]) & 0xF
        w = narrow(e2m1(nibbles) * e8m0(scale)[:, None], DTYPE)
        element = word[:, None] * 8 + tl.arange(0, 8)[None, :]
        tl.store(out + place * size + element, w, mask=inside[:, None])


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
        ValueError: `experts` is not one-dimensional, `out` does not fit, or the weights have another layout than FWD.
    """
    weights.require_layout(MXLayout.FWD, "dequantize_experts")
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
    if not experts.numel():
        return out
    tensors = out, aligned(weights.packed).view(torch.int32), weights.scales, experts.to(weights.device)
    _decoding(experts.numel(), weights.E, weights.N * weights.K, dtype, kinds(*tensors))(stream_of(out), *tensors)
    return out


@lru_cache(4096)
def _decoding(slots: int, E: int, size: int, dtype: torch.dtype, alike: Hashable) -> PreparedLaunch:
    return PreparedLaunch(
        dequantize_kernel,
        PROGRAMS,
        num_warps=4,
        num_stages=1,
        slots=slots,
        E=E,
        size=size,
        DTYPE={torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype],
        WORDS=WORDS,
        SLOTS=triton.next_power_of_2(slots),
    )


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
