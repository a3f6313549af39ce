"""The grouped product: every routed row times its expert's matrix. One kernel is Y, D (the routed rows of dX), Z
and V.

    out[p, j] = R( s · Σ_r low[p, r] · factor_e[r, j]  +  Σ_c in[p, c] · W_e[c, j]  +  bias_e[j] )

            in     W_e [C, J]        low   factor_e [r, J]    bias
    Z       x      A_eᵀ  [K, r]
    Y       x      W_e   [K, N]      Z     B_eᵀ               yes
    V       dY     B_e   [N, r]
    D       dY     W_eᵀ  [N, K]      V     A_e

W_e is dense, any strides, or packed MXFP4, decoded tile by tile from the one packed buffer in both directions: by the
portable kernel of this module, or for bf16 on Hopper by the one of `hopper` or, in the layout FRAGMENTS, of
`hopper_fragments`.

The accumulation chain is one fp32 accumulator, in this order: the LoRA product (a single step over the zero-padded
rank), one multiply by s in fp32, the base product in steps of BLOCK_K with c ascending in its natural order, one
addition of the bias, one rounding. Rows of a tile belong to one expert and do not meet, so a row's bits depend on
no other row.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mxref.kernels.device.configs import Config, padded_rank
from mxref.kernels.device.decode import load_mxfp4_tile, narrow
from mxref.kernels.device.hopper import HEIGHTS, ROWS_LAYOUT, TALLEST, packed_matmul_kernel
from mxref.kernels.device.hopper_fragments import (
    FRAGMENT_HEIGHTS,
    TALLEST_FRAGMENTS,
    fragments_matmul_kernel,
    half_left,
)
from mxref.kernels.device.launch import PreparedLaunch, aligned
from mxref.kernels.device.schedule import Routing, source_rows, tile_bound
from mxref.kernels.device.stack import PackedMatrix, Stack

__all__ = ["LowRank", "grouped_matmul"]

DENSE = tl.constexpr(0)
PACKED_ALONG_C = tl.constexpr(1)  # blocks run along the contraction: forward
PACKED_ALONG_J = tl.constexpr(2)  # blocks run along the output: dX

_TRITON_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit(do_not_specialize=["P", "E"])
def grouped_matmul_kernel(
    out,
    rows_in,
    weight,
    scales,
    low,
    factor,
    bias,
    positions,
    tiles,
    P,
    E,
    C,
    J,
    RANK,
    s,
    fan_in,
    fan_out,
    stride_we,
    stride_wc,
    stride_wj,
    stride_fe,
    stride_fr,
    stride_fj,
    STORAGE: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program computes one row tile times BLOCK_N columns; column blocks of a row tile are neighbours.

    rows_in [*, C], low [P, RANK], out [*, J] and bias [E, J] are contiguous; `fan_in` and `fan_out` say where a
    routed row lies in rows_in and out, see `source_rows`. Tiles of group E (sentinels) write zeros and read nothing
    else.
    """
    blocks = tl.cdiv(J, BLOCK_N)
    tile = tl.program_id(0) // blocks
    j0 = (tl.program_id(0) % blocks) * BLOCK_N
    expert = tl.load(tiles + tile * 3).to(tl.int64)
    begin = tl.load(tiles + tile * 3 + 1).to(tl.int64)
    end = tl.load(tiles + tile * 3 + 2).to(tl.int64)
    if begin >= end:
        return

    rows = begin + tl.arange(0, BLOCK_M)
    j = (j0 + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_J = j < J
    target, keep = source_rows(rows, rows < end, positions, fan_out, P)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    if expert < E:
        if low is not None:
            r = tl.arange(0, BLOCK_R)
            in_R = r < RANK
            l_tile = tl.load(
                low + rows[:, None] * RANK + r[None, :], mask=(rows < end)[:, None] & in_R[None, :], other=0
            )
            f_tile = tl.load(
                factor + expert * stride_fe + r[:, None] * stride_fr + j[None, :] * stride_fj,
                mask=in_R[:, None] & in_J[None, :],
                other=0,
            )
            acc = tl.dot(l_tile, f_tile, acc, input_precision="ieee") * s

        source, live = source_rows(rows, rows < end, positions, fan_in, P)
        for c0 in range(0, C, BLOCK_K):
            c = (c0 + tl.arange(0, BLOCK_K)).to(tl.int64)
            in_C = c < C
            x = tl.load(rows_in + source[:, None] * C + c[None, :], mask=live[:, None] & in_C[None, :], other=0)
            if STORAGE == DENSE:
                w = tl.load(
                    weight + expert * stride_we + c[:, None] * stride_wc + j[None, :] * stride_wj,
                    mask=in_C[:, None] & in_J[None, :],
                    other=0,
                )
            elif STORAGE == PACKED_ALONG_C:
                tile_jc = load_mxfp4_tile(
                    weight, scales, expert, j, c0, J, C, WEIGHT_DTYPE, BLOCK_N, BLOCK_K, FRAGMENTS
                )
                w = tl.trans(narrow(tile_jc, x.dtype))
            else:
                tile_cj = load_mxfp4_tile(
                    weight, scales, expert, c, j0, C, J, WEIGHT_DTYPE, BLOCK_K, BLOCK_N, FRAGMENTS
                )
                w = narrow(tile_cj, x.dtype)
            acc = tl.dot(x, w, acc, input_precision="ieee")

        if bias is not None:
            acc += tl.load(bias + expert * J + j, mask=in_J, other=0).to(tl.float32)[None, :]

    tl.store(
        out + target[:, None] * J + j[None, :],
        acc.to(out.dtype.element_ty),
        mask=keep[:, None] & in_J[None, :],
    )


class LowRank(NamedTuple):
    """An adapter's share of a product, s · low · factor_e: low [P, r] in expert order, factor [E, r, J]."""

    low: Tensor
    factor: Stack
    scaling: float


def grouped_matmul(
    rows_in: Tensor,
    weight: Stack | PackedMatrix,
    routing: Routing,
    config: Config,
    out: Tensor,
    fan_in: int | None = None,
    fan_out: int | None = None,
    lora: LowRank | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Fill `out` with every routed row times its expert's matrix; rows that no expert owns become zero.

    Args:
        rows_in: contiguous [*, C].
        weight: dense [E, C, J], any strides, or packed.
        routing: which rows belong to which expert.
        config: the tiling.
        out: contiguous [P, J], filled and returned.
        fan_in: None if rows_in is in expert order; otherwise a routed row is row position // fan_in of it.
        fan_out: None leaves `out` in expert order; 1 puts each routed row at its position.
        lora: an adapter's share, added first.
        bias: contiguous [E, J], added last.
    """
    E, C, J = weight.shape
    if not isinstance(weight, PackedMatrix) or C % 16:  # Hopper copies 16 bytes; Triton knows multiples of 16 elements
        config = config.dense()
    low, factor, scaling = lora or (None, None, 1.0)
    rank, factor_strides = (factor.shape[1], factor.strides) if factor else (0, (0, 0, 0))
    product = _Product(config, routing.P, E, C, J, rank, float(scaling).hex(), fan_in, fan_out, *factor_strides)
    tensors = {
        "out": out, "low": low, "factor": factor and factor.tensor, "bias": bias, "positions": routing.positions,
        "tiles": routing.tiles(config.BLOCK_M),
    }  # fmt: skip
    if config.fused:
        assert isinstance(weight, PackedMatrix)
        rows, packed, scales = aligned(rows_in), aligned(weight.packed), aligned(weight.scales)
        box = _box(rows, config) if fan_in is None else None
        if config.fragments:
            launch = _fragments(product, weight.transposed, weight.scales_to_128)
        else:
            launch = _hopper(product, weight.transposed)
        launch(rows_in=rows, rows_box=box, packed=packed, scales=scales, **tensors)
    elif isinstance(weight, PackedMatrix):
        along = PACKED_ALONG_J if weight.transposed else PACKED_ALONG_C
        launch = _portable(product, along.value, weight.fragments, weight.dtype)
        packed = aligned(weight.packed) if weight.fragments else weight.packed  # which is read by words, not by bytes
        launch(rows_in=rows_in, weight=packed, scales=weight.scales, **tensors)
    else:
        launch = _portable(product, DENSE.value, False, None, weight.strides)
        launch(rows_in=rows_in, weight=weight.tensor, **tensors)
    return out


class _Product(NamedTuple):
    """What a product's launch must know beside its tensors, and how its weights are stored.

    s as `float.hex` writes it: numbers as keys would take −0 for 0.
    """

    config: Config
    P: int
    E: int
    C: int
    J: int
    RANK: int
    s: str
    fan_in: int | None
    fan_out: int | None
    stride_fe: int
    stride_fr: int
    stride_fj: int

    def launch(self, kernel: Any, **own: Any) -> PreparedLaunch:
        """Its launch by one of the kernels, with that kernel's own arguments."""
        known = self._asdict() | {"s": float.fromhex(self.s), "BLOCK_R": padded_rank(self.RANK)} | own
        config = known.pop("config")
        programs = tile_bound(self.P, self.E, config.BLOCK_M) * triton.cdiv(self.J, config.BLOCK_N)
        return PreparedLaunch(kernel, programs, config.num_warps, config.num_stages, config.max_registers, **known)


@lru_cache(4096)
def _portable(
    product: _Product,
    storage: int,
    fragments: bool,
    dtype: torch.dtype | None,
    strides: tuple[int, int, int] = (0, 0, 0),
) -> PreparedLaunch:
    """By the portable kernel: `storage` as there, layout and `dtype` of packed weights, `strides` of dense ones."""
    config, (stride_we, stride_wc, stride_wj) = product.config, strides
    return product.launch(
        grouped_matmul_kernel,
        stride_we=stride_we,
        stride_wc=stride_wc,
        stride_wj=stride_wj,
        STORAGE=storage,
        FRAGMENTS=fragments,
        WEIGHT_DTYPE=dtype and _TRITON_DTYPE[dtype],
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
    )


@lru_cache(4096)
def _hopper(product: _Product, transposed: bool) -> PreparedLaunch:
    """By the kernel for Hopper."""
    pitch = (product.J if transposed else product.C) // 2
    return product.launch(
        packed_matmul_kernel,
        PITCH=pitch,
        TRANSPOSED=transposed,
        EVEN=product.C % product.config.BLOCK_K == 0,
        ALIGNED=pitch % 32 == 0,
        HEIGHTS=HEIGHTS[product.config.BLOCK_M],
        STAGES=product.config.num_stages,
    )


@lru_cache(4096)
def _fragments(product: _Product, transposed: bool, one_multiply: bool) -> PreparedLaunch:
    """By the kernel for Hopper that reads the layout FRAGMENTS."""
    config = product.config
    return product.launch(
        fragments_matmul_kernel,
        TRANSPOSED=transposed,
        EVEN=product.C % config.BLOCK_K == 0,
        ONE_MULTIPLY=one_multiply,
        HALF_LEFT=half_left(product.J, config),
        HEIGHTS=FRAGMENT_HEIGHTS[config.BLOCK_M],
        STAGES=config.num_stages,
        WARPS=config.num_warps,
    )


def _box(ordered: Tensor, config: Config) -> TensorDescriptor | None:
    """Rows in expert order as the tallest tiles fetch them; few rows are bound by other things than their copies."""
    tallest = TALLEST_FRAGMENTS if config.fragments else TALLEST
    if tallest != config.BLOCK_M or not ordered.numel():
        return None
    return TensorDescriptor.from_tensor(ordered, [config.BLOCK_M, 64], ROWS_LAYOUT.value)
