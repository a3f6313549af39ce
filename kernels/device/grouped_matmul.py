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

from typing import Any

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

__all__ = ["GroupedMatmul"]

DENSE = tl.constexpr(0)
PACKED_ALONG_C = tl.constexpr(1)  # blocks run along the contraction: forward
PACKED_ALONG_J = tl.constexpr(2)  # blocks run along the output: dX

_TRITON_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit(do_not_specialize=["P", "E", "fan_in"], do_not_specialize_on_alignment=["positions"])
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


class GroupedMatmul:
    """A grouped product of which everything but the tensors is known, for tensors of the same `kinds`.

    Args:
        matrix: how W_e lies in memory, dense or packed.
        config: the tiling.
        P: routed rows.
        fan_in: None if the rows are in expert order; otherwise a routed row is row position // fan_in of them.
        fan_out: None leaves the output in expert order; 1 puts each routed row at its position.
        factor: how an adapter's factor_e lies in memory; None without one.
        s: the scaling.
    """

    def __init__(
        self,
        matrix: Stack | PackedMatrix,
        config: Config,
        P: int,
        fan_in: int | None = None,
        fan_out: int | None = None,
        factor: Stack | None = None,
        s: float = 1.0,
    ) -> None:
        E, C, J = matrix.shape
        if not isinstance(matrix, PackedMatrix) or C % 16:  # which Hopper copies by 16 bytes, and Triton knows
            config = config.dense()
        rank, (stride_fe, stride_fr, stride_fj) = (factor.shape[1], factor.strides) if factor else (0, (0, 0, 0))
        self._shape, self._height, self._fused = (P, J), config.BLOCK_M, config.fused
        words = isinstance(matrix, PackedMatrix) and matrix.fragments  # of four bytes of W
        self._boxes = P > 0 and fan_in is None and tallest(config) == config.BLOCK_M
        kernel, own = _kernel(matrix, config)
        self._launch = PreparedLaunch(
            kernel,
            tile_bound(P, E, config.BLOCK_M) * triton.cdiv(J, config.BLOCK_N),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            max_registers=config.max_registers,
            aligned=(1, 3, 4) if config.fused else (2,) if words else (),
            P=P,
            E=E,
            C=C,
            J=J,
            RANK=rank,
            s=s,
            fan_in=fan_in,
            fan_out=fan_out,
            stride_fe=stride_fe,
            stride_fr=stride_fr,
            stride_fj=stride_fj,
            BLOCK_R=padded_rank(rank),
            **own,
        )

    def __call__(
        self,
        stream: int | None,
        rows_in: Tensor,
        weight: Tensor,
        scales: Tensor | None,
        routing: Routing,
        low: Tensor | None = None,
        factor: Tensor | None = None,
        bias: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Every routed row times its expert's matrix; rows that no expert owns become zero.

        Args:
            stream: the pass's, see `stream_of`.
            rows_in: contiguous [*, C].
            weight: where the matrices lie; packed ones with `scales`.
            routing: which rows belong to which expert.
            low: contiguous [P, r], in expert order: an adapter's share is s · low · factor_e, added first.
            factor: where the factors lie.
            bias: contiguous [E, J], added last.
            out: contiguous [P, J], filled and returned; a fresh one by default.
        """
        if out is None:
            out = rows_in.new_empty(*self._shape)
        rest = low, factor, bias, routing.positions, routing.tiles(self._height, stream)
        if not self._fused:
            self._launch(stream, out, rows_in, weight, scales, *rest)
            return out
        box = None
        if self._boxes:
            rows_in = aligned(rows_in)
            box = _box(rows_in, self._height)
        self._launch(stream, out, rows_in, box, weight, scales, *rest)
        return out


def _kernel(matrix: Stack | PackedMatrix, config: Config) -> tuple[Any, dict[str, Any]]:
    """The kernel for a matrix, and its own arguments."""
    if isinstance(matrix, Stack):
        return grouped_matmul_kernel, _portable(config, DENSE, matrix.strides)
    _, C, J = matrix.shape
    even = C % config.BLOCK_K == 0
    if config.fragments:
        return fragments_matmul_kernel, {
            "TRANSPOSED": matrix.transposed,
            "EVEN": even,
            "ONE_MULTIPLY": matrix.scales_to_128,
            "HALF_LEFT": half_left(J, config),
            "HEIGHTS": FRAGMENT_HEIGHTS[config.BLOCK_M],
            "STAGES": config.num_stages,
            "WARPS": config.num_warps,
        }
    if config.hopper:
        pitch = (J if matrix.transposed else C) // 2
        return packed_matmul_kernel, {
            "PITCH": pitch,
            "TRANSPOSED": matrix.transposed,
            "EVEN": even,
            "ALIGNED": pitch % 32 == 0,
            "HEIGHTS": HEIGHTS[config.BLOCK_M],
            "STAGES": config.num_stages,
        }
    along = PACKED_ALONG_J if matrix.transposed else PACKED_ALONG_C
    return grouped_matmul_kernel, _portable(config, along) | {
        "FRAGMENTS": matrix.fragments,
        "WEIGHT_DTYPE": _TRITON_DTYPE[matrix.dtype],
    }


def _portable(config: Config, storage: tl.constexpr, strides: tuple[int, int, int] = (0, 0, 0)) -> dict[str, Any]:
    """Arguments of the portable kernel: how weights are stored, and the strides of dense ones."""
    stride_we, stride_wc, stride_wj = strides
    return {
        "stride_we": stride_we,
        "stride_wc": stride_wc,
        "stride_wj": stride_wj,
        "STORAGE": storage.value,
        "FRAGMENTS": False,
        "WEIGHT_DTYPE": None,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
    }


def tallest(config: Config) -> int:
    """BLOCK_M of the tiles that boxes fill; few rows are bound by other things than their copies."""
    return TALLEST_FRAGMENTS if config.fragments else TALLEST if config.hopper else 0


def _box(ordered: Tensor, height: int) -> TensorDescriptor:
    """Rows in expert order as the tallest tiles fetch them."""
    rows, columns = ordered.shape
    strides = [columns, 1]  # its own mean nothing where there is one row
    return TensorDescriptor(ordered, [rows, columns], strides, [height, 64], ROWS_LAYOUT.value)
