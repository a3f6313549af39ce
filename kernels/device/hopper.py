"""The two products on packed MXFP4 weights for Hopper's warpgroup instructions, bf16, in Gluon.

    Y[p, n] = R( s · Σ_r Z[p, r] · B_e[n, r]  +  Σ_k x[p, k] · W_e[k, n]  +  bias_e[n] )
    D[p, k] = R( s · Σ_r V[p, r] · A_e[r, k]  +  Σ_n dY[p, n] · W_e[k, n] )

Both compute the transposed tile, weights times rows: decoded weights go from registers straight into the tensor cores
as the left operand of `wgmma`, so they never lie in shared memory, and every byte of them is decoded once per row tile.
The chain is that of `grouped_matmul`, and so are the bits.

One iteration takes two steps of 64 along the contraction. While the tensor cores work on one step, the warps decode the
next: a step's registers are rewritten only after the wait that follows the other step's instructions.

Rows of x and bytes of W arrive through a ring of asynchronous copies, 16 bytes a thread: K is a multiple of 32 anyway,
and for D 16 must divide N. The tallest tiles of rows in expert order are boxes of a matrix: the copy engine fetches
them whole, the rows behind an expert's last included, which are computed and not stored.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from mxref.kernels.device.hopper_decode import STEP, column_of, decode_step, load_scales, scales_of_step, store_scales

__all__ = ["HEIGHTS", "ROWS_LAYOUT", "TALLEST", "packed_matmul_kernel"]

_WARPS = gl.constexpr(8)
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name before triton 3.7

HEIGHTS = {256: (256, 128, 64, 16), 64: (64, 32, 16), 16: (16,)}
"""BLOCK_M -> heights of the row tiles among which a program chooses, by the rows that its tile really has."""

TALLEST = max(HEIGHTS)
"""BLOCK_M of the tiles that boxes fill."""

ROWS_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
"""How a step's rows of x lie in shared memory."""


@gluon.jit
def copy_rows(x0, x1, at, inside, k, left, EVEN: gl.constexpr):
    """Start the copies of an iteration's rows of x; `left` is what remains of the contraction there."""
    if EVEN:
        async_copy.async_copy_global_to_shared(x0, at, mask=inside)
        async_copy.async_copy_global_to_shared(x1, at + STEP, mask=inside)
    else:
        async_copy.async_copy_global_to_shared(x0, at, mask=inside & (k < left))
        async_copy.async_copy_global_to_shared(x1, at + STEP, mask=inside & (k < left - STEP))


@gluon.jit
def copy_box(x0, x1, rows_box, filled, row, k):
    """Let the copy engine fetch an iteration's rows of x as two boxes; `filled` completes with them."""
    mbarrier.expect(filled, 2 * rows_box.block_type.nbytes)
    tma.async_copy_global_to_shared(rows_box, [row, k], filled, x0)
    tma.async_copy_global_to_shared(rows_box, [row, k + STEP], filled, x1)


@gluon.jit
def copy_bytes(w0, w1, at, step, inside, along, left, ALONG: gl.constexpr, EVEN: gl.constexpr):
    """Start the copies of an iteration's bytes of W; ALONG of them, of `left`, lie along the contraction of a step."""
    if EVEN:
        async_copy.async_copy_global_to_shared(w0, at, mask=inside)
        async_copy.async_copy_global_to_shared(w1, at + step, mask=inside)
    else:
        async_copy.async_copy_global_to_shared(w0, at, mask=inside & (along < left))
        async_copy.async_copy_global_to_shared(w1, at + step, mask=inside & (along < left - ALONG))


@gluon.jit
def row_position(rows, live, positions, P, fan):
    """Row numbers in a buffer and their mask: `rows` in expert order (`fan` None), else positions[rows] // fan."""
    if fan is None:
        return rows, live
    else:
        position = gl.load(positions + rows, mask=live, other=-1).to(gl.int64)
        return position // fan, (position >= 0) & (position < P)


@gluon.jit
def lora_product(
    acc,
    low,
    factor,
    expert,
    begin,
    end,
    j0,
    J,
    RANK,
    s,
    stride_fe,
    stride_fr,
    stride_fj,
    operand: gl.constexpr,
    column: gl.constexpr,
    HOW: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_R: gl.constexpr,
    COLUMNS: gl.constexpr,
    WARPS: gl.constexpr,
):
    """s · (factorᵀ · lowᵀ) in the accumulator, [COLUMNS, BLOCK_M]; column(m, HOW) is the output column of its row m."""
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_R], gl.bfloat16)
    spread: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])
    rows = begin + gl.arange(0, BLOCK_M, gl.SliceLayout(1, spread))
    r = gl.arange(0, BLOCK_R, gl.SliceLayout(0, spread))
    tile = gl.load(low + rows[:, None] * RANK + r[None, :], mask=(rows < end)[:, None] & (r < RANK)[None, :], other=0.0)
    smem = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_M, BLOCK_R], shared)
    smem.store(tile)
    j = (j0 + column(gl.arange(0, COLUMNS, gl.SliceLayout(1, operand)), HOW)).to(gl.int64)
    r = gl.arange(0, BLOCK_R, gl.SliceLayout(0, operand))
    left = gl.load(
        factor + expert * stride_fe + r[None, :] * stride_fr + j[:, None] * stride_fj,
        mask=(r < RANK)[None, :] & (j < J)[:, None],
        other=0.0,
    )
    hopper.fence_async_shared()
    barrier()
    acc = hopper.warpgroup_mma(left, smem.permute([1, 0]), acc, is_async=True)
    return hopper.warpgroup_mma_wait(0, [acc]) * s


@gluon.jit
def packed_tile(
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
    PITCH,
    RANK,
    s,
    fan_in,
    fan_out,
    stride_fe,
    stride_fr,
    stride_fj,
    TRANSPOSED: gl.constexpr,
    EVEN: gl.constexpr,
    ALIGNED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_R: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One tile: at most BLOCK_M rows of one expert, 128 columns; arguments as in `packed_matmul_kernel`."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, BLOCK_M, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    x_threads: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [_WARPS, 1], [1, 0])
    s_threads: gl.constexpr = gl.BlockedLayout([1, 1], [16, 2], [_WARPS, 1], [1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])

    acc = gl.zeros([128, BLOCK_M], gl.float32, mma)
    LORA_FIRST: gl.constexpr = low is not None and BLOCK_R > 16  # its operand then shares memory with the ring
    if LORA_FIRST:
        acc = lora_product(
            hopper.warpgroup_mma_init(acc), low, factor, expert, begin, end, j0, J, RANK, s,
            stride_fe, stride_fr, stride_fj, operand, column_of, TRANSPOSED, BLOCK_M, BLOCK_R, 128, _WARPS,
        )  # fmt: skip

    # W's tile: Y takes 128 rows n and 32 bytes along k, D 64 rows n and 64 bytes along k.
    W_ROWS: gl.constexpr = STEP if TRANSPOSED else 128
    W_BYTES: gl.constexpr = 64 if TRANSPOSED else 32
    w_threads: gl.constexpr = gl.BlockedLayout([1, 16], [512 // W_BYTES, W_BYTES // 16], [_WARPS, 1], [1, 0])
    w_shared: gl.constexpr = gl.SwizzledSharedLayout(16, 128 // W_BYTES, W_BYTES // 16, [1, 0])
    w_n = gl.arange(0, W_ROWS, gl.SliceLayout(1, w_threads))
    w_b = gl.arange(0, W_BYTES, gl.SliceLayout(0, w_threads))
    s_n = gl.arange(0, 128, gl.SliceLayout(1, s_threads))
    s_b = gl.arange(0, 2, gl.SliceLayout(0, s_threads)) * 2
    x0 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, STEP], ROWS_LAYOUT)
    x1 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, STEP], ROWS_LAYOUT)
    w0 = gl.allocate_shared_memory(gl.uint8, [STAGES, W_ROWS, W_BYTES], w_shared)
    w1 = gl.allocate_shared_memory(gl.uint8, [STAGES, W_ROWS, W_BYTES], w_shared)
    blocks = PITCH // 16
    if TRANSPOSED:
        w_b += j0 // 2
        s_b += j0 // 32
        w_at = packed + (expert * C + w_n)[:, None] * PITCH + w_b[None, :]
        w_in = (w_b < PITCH)[None, :]
        w_along = w_n[:, None]
        w_step = STEP * PITCH
        w_left = C
        s_at = scales + (expert * C + s_n)[:, None] * blocks + s_b[None, :]
        s_step = 128 * blocks
        s_smem = gl.allocate_shared_memory(gl.uint16, [4, 128], plain)
    else:
        w_n += j0
        s_n += j0
        w_at = packed + (expert * J + w_n)[:, None] * PITCH + w_b[None, :]
        w_in = (w_n < J)[:, None]
        w_along = w_b[None, :]
        w_step = 32
        w_left = PITCH
        s_at = scales + (expert * J + s_n)[:, None] * blocks + s_b[None, :]
        s_step = 4
        s_smem = gl.allocate_shared_memory(gl.uint32, [128, 4], plain)
    W_ALONG: gl.constexpr = STEP if TRANSPOSED else 32

    if rows_box is not None:
        filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(filled.index(i), count=1)
        hopper.fence_async_shared()
        barrier()
        first = begin.to(gl.int32)
    else:
        rows = begin + gl.arange(0, BLOCK_M, gl.SliceLayout(1, x_threads))
        source, live = row_position(rows, rows < end, positions, P, fan_in)
        x_k = gl.arange(0, STEP, gl.SliceLayout(0, x_threads))[None, :]
        x_at = rows_in + source[:, None] * C + x_k
        x_in = live[:, None]

    steps = gl.cdiv(C, STEP)
    gl.assume(steps > 0)
    for i in gl.static_range(STAGES - 1):
        if 2 * i < steps:
            if rows_box is not None:
                copy_box(x0.index(i), x1.index(i), rows_box, filled.index(i), first, 2 * i * STEP)
            else:
                copy_rows(x0.index(i), x1.index(i), x_at + 2 * i * STEP, x_in, x_k, C - 2 * i * STEP, EVEN)
            left = w_left - 2 * i * W_ALONG
            copy_bytes(w0.index(i), w1.index(i), w_at, w_step, w_in, w_along, left, W_ALONG, EVEN)
        async_copy.commit_group()
        w_at += 2 * w_step
    if rows_box is None:
        x_at += 2 * (STAGES - 1) * STEP
    store_scales(s_smem, load_scales(s_at, s_n, s_b, blocks, C, J, 0, TRANSPOSED, ALIGNED), TRANSPOSED)
    s_at += s_step
    two = load_scales(s_at, s_n, s_b, blocks, C, J, 2, TRANSPOSED, ALIGNED)

    if low is not None and not LORA_FIRST:
        acc = lora_product(
            hopper.warpgroup_mma_init(acc), low, factor, expert, begin, end, j0, J, RANK, s,
            stride_fe, stride_fr, stride_fj, operand, column_of, TRANSPOSED, BLOCK_M, BLOCK_R, 128, _WARPS,
        )  # fmt: skip
    acc = hopper.warpgroup_mma_init(acc)
    a1 = gl.zeros([128, STEP], gl.bfloat16, operand)
    for i in range(0, steps, 2):
        stage = (i // 2) % STAGES
        async_copy.wait_group(STAGES - 2)
        if rows_box is not None:
            mbarrier.wait(filled.index(stage), (i // 2) // STAGES & 1)
        a0 = decode_step(w0.index(stage), scales_of_step(s_smem, 0, TRANSPOSED), operand, TRANSPOSED)
        if rows_box is None:
            hopper.fence_async_shared()  # here, where the loads that it waits for have long arrived
        acc = hopper.warpgroup_mma(a0, x0.index(stage).permute([1, 0]), acc, is_async=True)
        acc, a1 = hopper.warpgroup_mma_wait(1, [acc, a1])
        a1 = decode_step(w1.index(stage), scales_of_step(s_smem, 1, TRANSPOSED), operand, TRANSPOSED)
        acc = hopper.warpgroup_mma_init(acc)
        acc = hopper.warpgroup_mma(a1, x1.index(stage).permute([1, 0]), acc, is_async=True)
        acc, a0 = hopper.warpgroup_mma_wait(1, [acc, a0])
        acc = hopper.warpgroup_mma_init(acc)
        barrier()  # every warp is done with these scales, and with the stage before
        store_scales(s_smem, two, TRANSPOSED)
        ahead = i + 2 * STAGES - 2
        if ahead < steps:
            free = (stage + STAGES - 1) % STAGES
            if rows_box is not None:
                copy_box(x0.index(free), x1.index(free), rows_box, filled.index(free), first, ahead * STEP)
            else:
                copy_rows(x0.index(free), x1.index(free), x_at, x_in, x_k, C - ahead * STEP, EVEN)
            left = w_left - ahead * W_ALONG
            copy_bytes(w0.index(free), w1.index(free), w_at, w_step, w_in, w_along, left, W_ALONG, EVEN)
        async_copy.commit_group()
        if rows_box is None:
            x_at += 2 * STEP
        w_at += 2 * w_step
        s_at += s_step
        two = load_scales(s_at, s_n, s_b, blocks, C, J, i + 4, TRANSPOSED, ALIGNED)
    acc = hopper.warpgroup_mma_wait(0, [acc])
    async_copy.wait_group(0)
    if rows_box is not None:
        for i in gl.static_range(STAGES):
            mbarrier.invalidate(filled.index(i))

    if bias is not None:
        j = j0 + column_of(gl.arange(0, 128, gl.SliceLayout(1, mma)), TRANSPOSED)
        acc += gl.load(bias + expert * J + j, mask=j < J, other=0.0).to(gl.float32)[:, None]

    y_threads: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [_WARPS, 1], [1, 0])
    y = gl.convert_layout(acc.to(gl.bfloat16).permute([1, 0]), y_threads)
    if TRANSPOSED:
        y = y.reshape([BLOCK_M, 8, 2, 8]).permute([0, 1, 3, 2]).reshape([BLOCK_M, 128])
        y = gl.convert_layout(y, y_threads, assert_trivial=True)
    store_rows(out, y, positions, begin, end, j0, P, J, fan_out, BLOCK_M, _WARPS)


@gluon.jit
def store_rows(out, y, positions, begin, end, j0, P, J, fan_out, BLOCK_M: gl.constexpr, WARPS: gl.constexpr):
    """Write y [BLOCK_M, columns] to the rows begin..end of `out`, columns from j0."""
    threads: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
    rows = begin + gl.arange(0, BLOCK_M, gl.SliceLayout(1, threads))
    target, keep = row_position(rows, rows < end, positions, P, fan_out)
    j = j0 + gl.arange(0, y.shape[1], gl.SliceLayout(0, threads))
    gl.store(out + target[:, None] * J + j[None, :], y, mask=keep[:, None] & (j < J)[None, :])


@gluon.jit(
    do_not_specialize=["P", "E", "RANK", "fan_in", "stride_fe"],
    do_not_specialize_on_alignment=["stride_fr", "stride_fj"],
)
def packed_matmul_kernel(
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
    PITCH,
    RANK,
    s,
    fan_in,
    fan_out,
    stride_fe,
    stride_fr,
    stride_fj,
    TRANSPOSED: gl.constexpr,
    EVEN: gl.constexpr,
    ALIGNED: gl.constexpr,
    HEIGHTS: gl.constexpr,
    BLOCK_R: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One program computes one row tile times 128 columns, in the smallest of the tile heights that holds its rows.

    Args as in `grouped_matmul_kernel`, and: packed [E, N, K/2], scales [E, N, K/32]; Y has C = K and J = N, D the
    reverse (TRANSPOSED). PITCH: K/2. EVEN: 128 divides C. ALIGNED: K/32 is even. HEIGHTS: see above. rows_box: for rows
    in expert order, a descriptor of boxes [HEIGHTS[0], 64] of them, from which the tallest tiles are fetched; or None.
    """
    columns = gl.cdiv(J, 128)
    tile = gl.program_id(0) // columns
    j0 = (gl.program_id(0) % columns) * 128
    expert = gl.load(tiles + tile * 3).to(gl.int64)
    begin = gl.load(tiles + tile * 3 + 1).to(gl.int64)
    end = gl.load(tiles + tile * 3 + 2).to(gl.int64)
    if begin >= end:
        return
    if expert >= E:
        threads: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [_WARPS, 1], [1, 0])
        nothing = gl.zeros([16, 128], gl.bfloat16, threads)
        for first in range(0, HEIGHTS[0], 16):
            store_rows(out, nothing, positions, begin + first, end, j0, P, J, fan_out, 16, _WARPS)
        return
    for h in gl.static_range(len(HEIGHTS)):
        fits = end - begin <= HEIGHTS[h]
        larger = end - begin > HEIGHTS[h + 1] if h + 1 < len(HEIGHTS) else True
        if fits & larger:
            packed_tile(
                out, rows_in, rows_box if h == 0 else None, packed, scales, low, factor, bias, positions, expert,
                begin, end, j0, P, C, J, PITCH, RANK, s, fan_in, fan_out, stride_fe, stride_fr, stride_fj,
                TRANSPOSED, EVEN, ALIGNED, HEIGHTS[h], BLOCK_R, STAGES,
            )  # fmt: skip
