"""The two products of `hopper` on weights in the layout FRAGMENTS: the same chain and bits, with half the instructions.

Each warp copies its own tiles of codes, 16 bytes a thread, and reads them back whole: 32 columns of the output, whose
two fragments of 16 are two instructions' left operands. A program of 4 warps has 128 columns, one of 8 has 256 and
reads the rows of x half as often. A step is one tile of 32; an iteration takes four.

Where the last program of a row tile would have at most 128 columns of its 256 left, its two groups of 4 warps take
these columns both, and half the rows each: the tallest tiles are bound by the tensor cores, which then do half the
work.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from mxref.kernels.device.configs import Config
from mxref.kernels.device.hopper import (
    ROWS_LAYOUT,
    barrier,
    copy_box,
    copy_rows,
    lora_product,
    row_position,
    store_rows,
)
from mxref.kernels.device.hopper_decode import STEP
from mxref.kernels.device.hopper_unpack import column_of_row, rows_to_columns, unpack_tile

__all__ = ["FRAGMENT_HEIGHTS", "TALLEST_FRAGMENTS", "fragments_matmul_kernel", "half_left"]

FRAGMENT_HEIGHTS = {128: (128, 64, 32, 16), 64: (64, 32, 16), 16: (16,)}
"""BLOCK_M -> heights of the row tiles among which a program chooses, by the rows that its tile really has."""

TALLEST_FRAGMENTS = max(FRAGMENT_HEIGHTS)
"""BLOCK_M of the tiles that boxes fill."""


def half_left(J: int, config: Config) -> bool:
    """Whether the last program of a row tile has at most half its columns, and its groups of warps share them."""
    return config.BLOCK_M == TALLEST_FRAGMENTS and 0 < J % config.BLOCK_N <= config.BLOCK_N // 2


@gluon.jit
def places(
    buffer,
    first,
    along,
    across,
    group,
    last,
    WORDS: gl.constexpr,
    TILES: gl.constexpr,
    WARPS: gl.constexpr,
    threads: gl.constexpr,
):
    """Pointers to the WORDS words of each tile, [TILES along the contraction, WARPS, WORDS].

    Args:
        buffer: codes or scales.
        first: the number of the matrix's first tile.
        along, across: by how much a tile's number differs from its neighbour's.
        group, last: tiles across of the first warp, and of the matrix's last column; warps behind that repeat it.
    """
    tile = gl.arange(0, TILES, gl.SliceLayout(1, gl.SliceLayout(2, threads)))[:, None, None]
    warp = gl.minimum(group + gl.arange(0, WARPS, gl.SliceLayout(0, gl.SliceLayout(2, threads))), last)[None, :, None]
    word = gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(1, threads)))[None, None, :]
    return buffer.to(gl.pointer_type(gl.uint32)) + (first + tile * along + warp * across) * WORDS + word


@gluon.jit
def copy_tiles(codes, scales, w_at, s_at, s_tile, along, left, EVEN: gl.constexpr):
    """Start the copies of an iteration's four tiles along the contraction, of which `left` exist."""
    for t in gl.static_range(4):
        if EVEN:
            async_copy.async_copy_global_to_shared(codes.slice(t, 1), w_at + t * 128 * along)
        else:
            async_copy.async_copy_global_to_shared(codes.slice(t, 1), w_at + t * 128 * along, mask=t < left)
    if EVEN:
        async_copy.async_copy_global_to_shared(scales, s_at)
    else:
        async_copy.async_copy_global_to_shared(scales, s_at, mask=s_tile < left)


@gluon.jit
def fragments_tile(
    out,
    rows_in,
    rows_box,
    packed,
    scales,
    low,
    factor,
    bias,
    positions,
    expert,
    begin,
    end,
    j0,
    P,
    C,
    J,
    RANK,
    s,
    fan_in,
    fan_out,
    stride_fe,
    stride_fr,
    stride_fj,
    TRANSPOSED: gl.constexpr,
    EVEN: gl.constexpr,
    ONE_MULTIPLY: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_R: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    GROUPS: gl.constexpr,
):
    """One tile: at most BLOCK_M rows of one expert, 32·WARPS columns; arguments as in `fragments_matmul_kernel`.

    GROUPS of as many warps take the same columns, and a part of the rows each.
    """
    COLUMNS: gl.constexpr = 32 * WARPS
    ALL_WARPS: gl.constexpr = WARPS * GROUPS
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, GROUPS], [16, BLOCK_M // GROUPS, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    x_threads: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [ALL_WARPS, 1], [1, 0])
    w_threads: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [1, ALL_WARPS, 1], [2, 1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    s_threads: gl.constexpr = gl.BlockedLayout([1, 1, 1], [4, 1, 8], [1, ALL_WARPS, 1], [2, 1, 0])

    acc = gl.zeros([COLUMNS, BLOCK_M], gl.float32, mma)
    if low is not None:
        acc = lora_product(
            hopper.warpgroup_mma_init(acc), low, factor, expert, begin, end, j0, J, RANK, s,
            stride_fe, stride_fr, stride_fj, operand, column_of_row, WARPS, BLOCK_M, BLOCK_R, COLUMNS, ALL_WARPS,
        )  # fmt: skip

    # A stack is a matrix of tiles for each expert, [N/32, K/32]; an iteration takes four along the contraction.
    steps, across = C // 32, J // 32
    if TRANSPOSED:
        STRIDE_ALONG, STRIDE_ACROSS = across, 1
    else:
        STRIDE_ALONG, STRIDE_ACROSS = 1, steps
    first, group, last = expert * steps * across, j0 // 32, across - 1
    w_at = places(packed, first, STRIDE_ALONG, STRIDE_ACROSS, group, last, 128, 1, WARPS, w_threads)
    s_at = places(scales, first, STRIDE_ALONG, STRIDE_ACROSS, group, last, 8, 4, WARPS, s_threads)
    s_tile = gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(2, s_threads)))[:, None, None]
    w_ring = gl.allocate_shared_memory(gl.uint32, [STAGES, 4, WARPS, 128], plain)
    s_ring = gl.allocate_shared_memory(gl.uint32, [STAGES, 4, WARPS, 8], plain)
    x0 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, STEP], ROWS_LAYOUT)
    x1 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, STEP], ROWS_LAYOUT)
    if rows_box is not None:
        filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(filled.index(i), count=1)
        hopper.fence_async_shared()
        barrier()
        first_row = begin.to(gl.int32)
    else:
        row = gl.arange(0, BLOCK_M, gl.SliceLayout(1, x_threads))
        # Not begin + row < end: that the epilogue computes, and the compiler would keep it through the loop.
        source, live = row_position(begin + row, row < end - begin, positions, P, fan_in)
        x_k = gl.arange(0, STEP, gl.SliceLayout(0, x_threads))[None, :]
        x_at = rows_in + source[:, None] * C + x_k
        x_in = live[:, None]

    gl.assume(steps > 0)
    for i in gl.static_range(STAGES - 1):
        if 4 * i < steps:
            if rows_box is not None:
                copy_box(x0.index(i), x1.index(i), rows_box, filled.index(i), first_row, 2 * i * STEP)
            else:
                copy_rows(x0.index(i), x1.index(i), x_at + 2 * i * STEP, x_in, x_k, C - 2 * i * STEP, EVEN)
            left = steps - 4 * i
            copy_tiles(w_ring.index(i), s_ring.index(i), w_at, s_at, s_tile, STRIDE_ALONG, left, EVEN)
        async_copy.commit_group()
        w_at += 4 * STRIDE_ALONG * 128
        s_at += 4 * STRIDE_ALONG * 8
    if rows_box is None:
        x_at += 2 * (STAGES - 1) * STEP

    acc = hopper.warpgroup_mma_init(acc)
    before = gl.zeros([COLUMNS, 32], gl.bfloat16, operand)
    stage, free, phase = 0, STAGES - 1, 0
    for i in range(0, steps, 4):
        async_copy.wait_group(STAGES - 2)
        if rows_box is not None:
            mbarrier.wait(filled.index(stage), phase)
        for t in gl.static_range(4):
            codes, factors = w_ring.index(stage).slice(t, 1), s_ring.index(stage).slice(t, 1)
            weight = unpack_tile(codes, factors, operand, TRANSPOSED, ONE_MULTIPLY, GROUPS)
            if t == 0 and rows_box is None:
                hopper.fence_async_shared()  # here, where the loads that it waits for have long arrived
            x = (x0 if t < 2 else x1).index(stage).slice(t % 2 * 32, 32, dim=1)
            acc = hopper.warpgroup_mma(weight, x.permute([1, 0]), acc, is_async=True)
            acc, before = hopper.warpgroup_mma_wait(1, [acc, before])
            acc = hopper.warpgroup_mma_init(acc)
            before = weight
        barrier()  # every warp is done with the stage before
        ahead = i + 4 * STAGES - 4
        if ahead < steps:
            if rows_box is not None:
                copy_box(x0.index(free), x1.index(free), rows_box, filled.index(free), first_row, ahead * 32)
            else:
                copy_rows(x0.index(free), x1.index(free), x_at, x_in, x_k, C - ahead * 32, EVEN)
            left = steps - ahead
            copy_tiles(w_ring.index(free), s_ring.index(free), w_at, s_at, s_tile, STRIDE_ALONG, left, EVEN)
        async_copy.commit_group()
        free = stage
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        phase = gl.where(stage == 0, phase ^ 1, phase)
        if rows_box is None:
            x_at += 2 * STEP
        w_at += 4 * STRIDE_ALONG * 128
        s_at += 4 * STRIDE_ALONG * 8
    acc = hopper.warpgroup_mma_wait(0, [acc])
    async_copy.wait_group(0)
    if rows_box is not None:
        for i in gl.static_range(STAGES):
            mbarrier.invalidate(filled.index(i))

    if bias is not None:
        j = j0 + column_of_row(gl.arange(0, COLUMNS, gl.SliceLayout(1, mma)), WARPS)
        acc += gl.load(bias + expert * J + j, mask=j < J, other=0.0).to(gl.float32)[:, None]

    y_threads: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [ALL_WARPS, 1], [1, 0])
    y = gl.convert_layout(rows_to_columns(acc.to(gl.bfloat16).permute([1, 0]), BLOCK_M, WARPS), y_threads)
    store_rows(out, y, positions, begin, end, j0, P, J, fan_out, BLOCK_M, ALL_WARPS)


@gluon.jit
def in_smallest_height(
    out,
    rows_in,
    rows_box,
    operands,
    TRANSPOSED: gl.constexpr,
    EVEN: gl.constexpr,
    ONE_MULTIPLY: gl.constexpr,
    HALF_LEFT: gl.constexpr,
    HEIGHTS: gl.constexpr,
    H: gl.constexpr,
    BLOCK_R: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
):
    """`fragments_tile` in the last of HEIGHTS, from number H on, that holds the tile's rows; boxes fill the first."""
    LESS: gl.constexpr = HEIGHTS[H + 1] if len(HEIGHTS) > H + 1 else 0
    begin, end, j0, J = operands[7], operands[8], operands[9], operands[12]
    if end - begin > LESS:
        if HALF_LEFT and H == 0:
            if J - j0 <= 16 * WARPS:
                fragments_tile(
                    out, rows_in, rows_box, *operands, TRANSPOSED, EVEN, ONE_MULTIPLY, HEIGHTS[H], BLOCK_R, STAGES,
                    WARPS // 2, 2,
                )  # fmt: skip
            else:
                fragments_tile(
                    out, rows_in, rows_box, *operands, TRANSPOSED, EVEN, ONE_MULTIPLY, HEIGHTS[H], BLOCK_R, STAGES,
                    WARPS, 1,
                )  # fmt: skip
        else:
            fragments_tile(
                out, rows_in, rows_box, *operands, TRANSPOSED, EVEN, ONE_MULTIPLY, HEIGHTS[H], BLOCK_R, STAGES,
                WARPS, 1,
            )  # fmt: skip
    elif len(HEIGHTS) > H + 1:
        in_smallest_height(
            out, rows_in, None, operands, TRANSPOSED, EVEN, ONE_MULTIPLY, HALF_LEFT, HEIGHTS, H + 1, BLOCK_R, STAGES,
            WARPS,
        )  # fmt: skip


@gluon.jit(
    do_not_specialize=["P", "E", "RANK", "fan_in", "stride_fe"],
    do_not_specialize_on_alignment=["stride_fr", "stride_fj"],
)
def fragments_matmul_kernel(
    out,
    rows_in,
    rows_box,
    packed,
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
    stride_fe,
    stride_fr,
    stride_fj,
    TRANSPOSED: gl.constexpr,
    EVEN: gl.constexpr,
    ONE_MULTIPLY: gl.constexpr,
    HALF_LEFT: gl.constexpr,
    HEIGHTS: gl.constexpr,
    BLOCK_R: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
):
    """One program computes one row tile times 32·WARPS columns, in the smallest tile height that holds its rows.

    Args as in `packed_matmul_kernel`, and: packed, scales: in the layout FRAGMENTS, aligned to 16 bytes; 32 divides C
    and J. ONE_MULTIPLY: every scale byte is at most 128. HALF_LEFT: see `half_left`. WARPS: 4 or 8, the program's.
    """
    columns = gl.cdiv(J, 32 * WARPS)
    tile = gl.program_id(0) // columns
    j0 = (gl.program_id(0) % columns) * (32 * WARPS)
    expert = gl.load(tiles + tile * 3).to(gl.int64)
    begin = gl.load(tiles + tile * 3 + 1).to(gl.int64)
    end = gl.load(tiles + tile * 3 + 2).to(gl.int64)
    if begin >= end:
        return
    if expert >= E:
        threads: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
        nothing = gl.zeros([16, 32 * WARPS], gl.bfloat16, threads)
        for first in range(0, HEIGHTS[0], 16):
            store_rows(out, nothing, positions, begin + first, end, j0, P, J, fan_out, 16, WARPS)
        return
    operands = (
        packed, scales, low, factor, bias, positions, expert, begin, end, j0, P, C, J, RANK, s, fan_in, fan_out,
        stride_fe, stride_fr, stride_fj,
    )  # fmt: skip
    in_smallest_height(
        out, rows_in, rows_box, operands, TRANSPOSED, EVEN, ONE_MULTIPLY, HALF_LEFT, HEIGHTS, 0, BLOCK_R, STAGES, WARPS
    )
