"""The two products on packed MXFP4 weights for Hopper's warpgroup instructions, bf16, in Gluon.

    Y[p, n] = R( s · Σ_r Z[p, r] · B_e[n, r]  +  Σ_k x[p, k] · W_e[k, n]  +  bias_e[n] )
    D[p, k] = R( s · Σ_r V[p, r] · A_e[r, k]  +  Σ_n dY[p, n] · W_e[k, n] )

Both compute the transposed tile, weights times rows: decoded weights go from registers straight into the tensor cores
as the left operand of `wgmma`, so they never lie in shared memory, and every byte of them is decoded once per row tile.
The chain is that of `grouped_matmul`, and so are the bits.

A left operand's 32-bit register holds two neighbours of the contraction. In Y these are the two codes of one byte. In D
they are the same code of two bytes, from two rows of W; so the two codes of a byte belong to two output columns, which
the tensor core's layout puts eight apart: within sixteen, accumulator row 8h + g is column 2g + h (`column_of`).

One iteration takes two steps of 64 along the contraction. While the tensor cores work on one step, the warps decode the
next: a step's registers are rewritten only after the wait that follows the other step's instructions.

Rows of x and bytes of W arrive through a ring of asynchronous copies. Scale bytes are too narrow for those: each is
loaded an iteration ahead, converted once to bf16 and put into shared memory. The copies take 16 bytes at a time: K is a
multiple of 32 anyway, and for D 16 must divide N.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy
from triton.runtime.jit import constexpr_function

__all__ = ["BLOCK_N", "HEIGHTS", "packed_matmul_kernel"]

BLOCK_N = 128
"""Output columns of a program: 64 a warpgroup."""

_STEP = gl.constexpr(64)
_WARPS = gl.constexpr(8)
_PLACEMENT = gl.constexpr(0x7E807E80)  # 2^126 twice, in bf16
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name before triton 3.7


HEIGHTS = {256: (256, 128, 64, 16), 64: (64, 32, 16), 16: (16,)}
"""BLOCK_M -> heights of the row tiles among which a program chooses, by the rows that its tile really has."""


# Which thread holds what, as bit matrices: a row says by how much a bit of the register, lane or warp number moves.


@constexpr_function
def _forward_bytes() -> Any:
    """Bytes [n, 32-block, byte] of a step: those whose codes the left operand's layout gives to a thread."""
    return gl.DistributedLinearLayout(
        reg_bases=[[8, 0, 0], [0, 0, 4], [0, 0, 8], [0, 1, 0]],
        lane_bases=[[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0], [64, 0, 0]],
        block_bases=[],
        shape=[128, 2, 16],
    )


@constexpr_function
def _backward_bytes() -> Any:
    """Bytes [n, byte] of a step."""
    return gl.DistributedLinearLayout(
        reg_bases=[[1, 0], [8, 0], [16, 0], [32, 0]],
        lane_bases=[[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]],
        warp_bases=[[0, 8], [0, 16], [0, 32]],
        block_bases=[],
        shape=[64, 64],
    )


@constexpr_function
def _backward_pairs() -> Any:
    """Pairs of bytes [pair of n, 32-block, byte] of a step."""
    return gl.DistributedLinearLayout(
        reg_bases=[[4, 0, 0], [8, 0, 0], [16, 0, 0]],
        lane_bases=[[1, 0, 0], [2, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]],
        warp_bases=[[0, 0, 8], [0, 1, 0], [0, 2, 0]],
        block_bases=[],
        shape=[32, 4, 16],
    )


@constexpr_function
def _backward_scales() -> Any:
    """Scales [32-block, n] of a step: both of a pair in one thread."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 8], [0, 16], [0, 32]],
        lane_bases=[[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]],
        warp_bases=[[0, 0], [1, 0], [2, 0]],
        block_bases=[],
        shape=[4, 64],
    )


@gluon.jit
def scale_bits(b):
    """The bf16 bits of 2^(b−127) for bytes b (uint32): a subnormal for 0, NaN for 255."""
    edge = gl.where(((b + 1) & 0xFE) == 0, 0x40, 0).to(gl.uint32)
    return (b << 7) | edge


@gluon.jit
def codes_of_byte(codes, scale):
    """The two codes of each byte (uint32, low nibble first) times a scale (twice in 32 bits), as two bf16 in 32 bits.

    The nibbles go to bits 0 to 3 of either half. n·0x1040 puts a copy of each with its sign at bit 15 and one with its
    magnitude at bits 6 to 8: the bf16 value · 2^−126, as in `decode`. Two exact products follow.
    """
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b32 t;
        mul.lo.u32 t, $1, 0x1001;
        and.b32 t, t, 0x000F000F;
        mul.lo.u32 t, t, 0x1040;
        and.b32 t, t, 0x81C081C0;
        mul.rn.bf16x2 t, t, $3;
        mul.rn.bf16x2 $0, t, $2;
        }
        """,
        "=r,r,r,r",
        [codes, scale, _PLACEMENT],
        dtype=gl.uint32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def codes_of_two_bytes(pair, scales):
    """The low codes, and the high codes, of two bytes (bits 0 to 7 and 16 to 23) times their scales: two bf16 each."""
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b32 t;
        and.b32 t, $2, 0x000F000F;
        mul.lo.u32 t, t, 0x1040;
        and.b32 t, t, 0x81C081C0;
        mul.rn.bf16x2 t, t, $4;
        mul.rn.bf16x2 $0, t, $3;
        and.b32 t, $2, 0x00F000F0;
        mul.lo.u32 t, t, 0x0104;
        and.b32 t, t, 0x81C081C0;
        mul.rn.bf16x2 t, t, $4;
        mul.rn.bf16x2 $1, t, $3;
        }
        """,
        "=&r,=&r,r,r,r",
        [pair, scales, _PLACEMENT],
        dtype=(gl.uint32, gl.uint32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def halves(pair):
    """Both bf16 of 32 bits, along a new last axis."""
    low = pair.to(gl.uint16).to(gl.bfloat16, bitcast=True)
    return gl.join(low, (pair >> 16).to(gl.uint16).to(gl.bfloat16, bitcast=True))


@gluon.jit
def decode_step(w, scales, operand: gl.constexpr, TRANSPOSED: gl.constexpr):
    """One step's weights as the left operand [128, 64], from shared memory: bytes `w` and bf16 bits `scales`.

    Y: w [128 n, 32], scales uint32 [128 n, 2]. D: w [64 n, 64], scales uint16 [4, 64 n].
    """
    if TRANSPOSED:
        pairs: gl.constexpr = _backward_pairs()
        codes = w.load(_backward_bytes()).to(gl.uint32)
        even, odd = gl.split(codes.reshape([32, 2, 64]).permute([0, 2, 1]))
        pair = gl.convert_layout((even | (odd << 16)).reshape([32, 4, 16]), pairs, assert_trivial=True)
        even, odd = gl.split(scales.load(_backward_scales()).to(gl.uint32).reshape([4, 32, 2]))
        scale = gl.convert_layout((even | (odd << 16)).permute([1, 0]), gl.SliceLayout(2, pairs), assert_trivial=True)
        pair, scale = gl.broadcast(pair, gl.expand_dims(scale, 2))
        low, high = codes_of_two_bytes(pair, scale)
        weight = gl.join(halves(low), halves(high)).reshape([32, 8, 8, 2, 2]).permute([1, 4, 2, 0, 3])
    else:
        layout: gl.constexpr = _forward_bytes()
        codes = w.reshape([128, 2, 16]).load(layout).to(gl.uint32)
        scale = gl.expand_dims(scales.load(gl.SliceLayout(2, layout)), 2)
        codes, scale = gl.broadcast(codes, scale)
        weight = halves(codes_of_byte(codes, scale))
    return gl.convert_layout(weight.reshape([128, 64]), operand, assert_trivial=True)


@gluon.jit
def load_scales(at, next_at, rows, columns, ALIGNED: gl.constexpr):
    """Two neighbouring scale bytes of each row in 16 bits; `rows` and `columns` say what is inside, 0 elsewhere."""
    if ALIGNED:
        return gl.load(at.to(gl.pointer_type(gl.uint16)), mask=rows & (columns > 0), other=0)
    else:
        low = gl.load(at, mask=rows & (columns > 0), other=0).to(gl.uint16)
        return low | (gl.load(next_at, mask=rows & (columns > 1), other=0).to(gl.uint16) << 8)


@gluon.jit
def store_scales(smem, two, TRANSPOSED: gl.constexpr):
    """Convert an iteration's scales and put them where `decode_step` reads them."""
    two = two.to(gl.uint32)
    bits = gl.join(scale_bits(two & 0xFF), scale_bits(two >> 8)).reshape([128, 4])
    if TRANSPOSED:
        smem.store(bits.to(gl.uint16).permute([1, 0]))
    else:
        smem.store(bits * 0x10001)


@gluon.jit
def copy_step(x, w, x_at, w_at, x_in, w_in, x_left, w_left, EVEN: gl.constexpr):
    """Start the copies of one step; `x_left` and `w_left` are what remains of the contraction there."""
    if EVEN:
        async_copy.async_copy_global_to_shared(x, x_at, mask=x_in)
        async_copy.async_copy_global_to_shared(w, w_at, mask=w_in)
    else:
        async_copy.async_copy_global_to_shared(x, x_at, mask=x_in & x_left)
        async_copy.async_copy_global_to_shared(w, w_at, mask=w_in & w_left)


@gluon.jit
def column_of(m, TRANSPOSED: gl.constexpr):
    """The output column, counted from the tile's first, of an accumulator row."""
    if TRANSPOSED:
        return m & ~15 | (m & 7) << 1 | (m >> 3) & 1
    else:
        return m


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
    TRANSPOSED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_R: gl.constexpr,
):
    """s · (factorᵀ · lowᵀ) in the accumulator, [128, BLOCK_M]."""
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_R], gl.bfloat16)
    spread: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [_WARPS, 1], [1, 0])
    rows = begin + gl.arange(0, BLOCK_M, gl.SliceLayout(1, spread))
    r = gl.arange(0, BLOCK_R, gl.SliceLayout(0, spread))
    tile = gl.load(low + rows[:, None] * RANK + r[None, :], mask=(rows < end)[:, None] & (r < RANK)[None, :], other=0.0)
    smem = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_M, BLOCK_R], shared)
    smem.store(tile)
    j = (j0 + column_of(gl.arange(0, 128, gl.SliceLayout(1, operand)), TRANSPOSED)).to(gl.int64)
    r = gl.arange(0, BLOCK_R, gl.SliceLayout(0, operand))
    left = gl.load(
        factor + expert * stride_fe + r[None, :] * stride_fr + j[:, None] * stride_fj,
        mask=(r < RANK)[None, :] & (j < J)[:, None],
        other=0.0,
    )
    hopper.fence_async_shared()
    _barrier()
    acc = hopper.warpgroup_mma(left, smem.permute([1, 0]), acc, is_async=True)
    return hopper.warpgroup_mma_wait(0, [acc]) * s


@gluon.jit
def packed_tile(
    out,
    rows_in,
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
    x_shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])

    acc = gl.zeros([128, BLOCK_M], gl.float32, mma)
    LORA_FIRST: gl.constexpr = low is not None and BLOCK_R > 16  # its operand then shares memory with the ring
    if LORA_FIRST:
        acc = lora_product(
            hopper.warpgroup_mma_init(acc), low, factor, expert, begin, end, j0, J, RANK, s,
            stride_fe, stride_fr, stride_fj, operand, TRANSPOSED, BLOCK_M, BLOCK_R,
        )  # fmt: skip

    rows = begin + gl.arange(0, BLOCK_M, gl.SliceLayout(1, x_threads))
    source, live = row_position(rows, rows < end, positions, P, fan_in)
    x_k = gl.arange(0, _STEP, gl.SliceLayout(0, x_threads))[None, :]
    x_at = rows_in + source[:, None] * C + x_k
    x_in = live[:, None]

    # W's tile: Y takes 128 rows n and 32 bytes along k, D 64 rows n and 64 bytes along k.
    W_ROWS: gl.constexpr = _STEP if TRANSPOSED else 128
    W_BYTES: gl.constexpr = 64 if TRANSPOSED else 32
    w_threads: gl.constexpr = gl.BlockedLayout([1, 16], [512 // W_BYTES, W_BYTES // 16], [_WARPS, 1], [1, 0])
    w_shared: gl.constexpr = gl.SwizzledSharedLayout(16, 128 // W_BYTES, W_BYTES // 16, [1, 0])
    w_n = gl.arange(0, W_ROWS, gl.SliceLayout(1, w_threads))
    w_b = gl.arange(0, W_BYTES, gl.SliceLayout(0, w_threads))
    s_n = gl.arange(0, 128, gl.SliceLayout(1, s_threads))
    s_b = gl.arange(0, 2, gl.SliceLayout(0, s_threads)) * 2
    x0 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, _STEP], x_shared)
    x1 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, _STEP], x_shared)
    w0 = gl.allocate_shared_memory(gl.uint8, [STAGES, W_ROWS, W_BYTES], w_shared)
    w1 = gl.allocate_shared_memory(gl.uint8, [STAGES, W_ROWS, W_BYTES], w_shared)
    blocks = PITCH // 16
    if TRANSPOSED:
        w_b += j0 // 2
        s_b += j0 // 32
        w_at = packed + (expert * C + w_n)[:, None] * PITCH + w_b[None, :]
        w_in = (w_b < PITCH)[None, :]
        w_along = w_n[:, None]
        w_step = _STEP * PITCH
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
    W_STEP: gl.constexpr = _STEP if TRANSPOSED else 32  # of w_along, a step

    steps = gl.cdiv(C, _STEP)
    gl.assume(steps > 0)
    for i in gl.static_range(STAGES - 1):
        if 2 * i < steps:
            left, along = C - 2 * i * _STEP, w_left - 2 * i * W_STEP
            copy_step(x0.index(i), w0.index(i), x_at, w_at, x_in, w_in, x_k < left, w_along < along, EVEN)
            left, along = left - _STEP, along - W_STEP
            copy_step(
                x1.index(i), w1.index(i), x_at + _STEP, w_at + w_step, x_in, w_in, x_k < left, w_along < along, EVEN
            )
        async_copy.commit_group()
        x_at += 2 * _STEP
        w_at += 2 * w_step
    two = load_step_scales(s_at, s_n, s_b, blocks, C, J, 0, TRANSPOSED, ALIGNED)
    store_scales(s_smem, two, TRANSPOSED)
    s_at += s_step
    two = load_step_scales(s_at, s_n, s_b, blocks, C, J, 2, TRANSPOSED, ALIGNED)

    if low is not None and not LORA_FIRST:
        acc = lora_product(
            hopper.warpgroup_mma_init(acc), low, factor, expert, begin, end, j0, J, RANK, s,
            stride_fe, stride_fr, stride_fj, operand, TRANSPOSED, BLOCK_M, BLOCK_R,
        )  # fmt: skip
    acc = hopper.warpgroup_mma_init(acc)
    a1 = gl.zeros([128, _STEP], gl.bfloat16, operand)
    for i in range(0, steps, 2):
        stage = (i // 2) % STAGES
        async_copy.wait_group(STAGES - 2)
        a0 = decode_step(w0.index(stage), first_scales(s_smem, TRANSPOSED), operand, TRANSPOSED)
        hopper.fence_async_shared()  # here, where the loads that it waits for have long arrived
        acc = hopper.warpgroup_mma(a0, x0.index(stage).permute([1, 0]), acc, is_async=True)
        acc, a1 = hopper.warpgroup_mma_wait(1, [acc, a1])
        a1 = decode_step(w1.index(stage), second_scales(s_smem, TRANSPOSED), operand, TRANSPOSED)
        acc = hopper.warpgroup_mma_init(acc)
        acc = hopper.warpgroup_mma(a1, x1.index(stage).permute([1, 0]), acc, is_async=True)
        acc, a0 = hopper.warpgroup_mma_wait(1, [acc, a0])
        acc = hopper.warpgroup_mma_init(acc)
        _barrier()  # every warp is done with these scales, and with the stage before
        store_scales(s_smem, two, TRANSPOSED)
        ahead = i + 2 * STAGES - 2
        if ahead < steps:
            free = (stage + STAGES - 1) % STAGES
            left, along = C - ahead * _STEP, w_left - ahead * W_STEP
            copy_step(x0.index(free), w0.index(free), x_at, w_at, x_in, w_in, x_k < left, w_along < along, EVEN)
            left, along = left - _STEP, along - W_STEP
            copy_step(
                x1.index(free), w1.index(free), x_at + _STEP, w_at + w_step, x_in, w_in, x_k < left, w_along < along,
                EVEN,
            )  # fmt: skip
        async_copy.commit_group()
        x_at += 2 * _STEP
        w_at += 2 * w_step
        s_at += s_step
        two = load_step_scales(s_at, s_n, s_b, blocks, C, J, i + 4, TRANSPOSED, ALIGNED)
    acc = hopper.warpgroup_mma_wait(0, [acc])
    async_copy.wait_group(0)

    if bias is not None:
        j = j0 + column_of(gl.arange(0, 128, gl.SliceLayout(1, mma)), TRANSPOSED)
        acc += gl.load(bias + expert * J + j, mask=j < J, other=0.0).to(gl.float32)[:, None]

    y_threads: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [_WARPS, 1], [1, 0])
    y = gl.convert_layout(acc.to(gl.bfloat16).permute([1, 0]), y_threads)
    if TRANSPOSED:
        y = y.reshape([BLOCK_M, 8, 2, 8]).permute([0, 1, 3, 2]).reshape([BLOCK_M, 128])
        y = gl.convert_layout(y, y_threads, assert_trivial=True)
    store_rows(out, y, positions, begin, end, j0, P, J, fan_out, BLOCK_M)


@gluon.jit
def load_step_scales(s_at, s_n, s_b, blocks, C, J, step, TRANSPOSED: gl.constexpr, ALIGNED: gl.constexpr):
    """The scale bytes of the iteration that begins with `step`, two in 16 bits."""
    if TRANSPOSED:
        return load_scales(s_at, s_at + 1, (s_n < C - step * _STEP)[:, None], (blocks - s_b)[None, :], ALIGNED)
    else:
        return load_scales(s_at, s_at + 1, (s_n < J)[:, None], (blocks - 2 * step - s_b)[None, :], ALIGNED)


@gluon.jit
def first_scales(s_smem, TRANSPOSED: gl.constexpr):
    """The part of an iteration's scales that its first step needs."""
    return s_smem.slice(0, 64, dim=1) if TRANSPOSED else s_smem.slice(0, 2, dim=1)


@gluon.jit
def second_scales(s_smem, TRANSPOSED: gl.constexpr):
    """The part that its second step needs."""
    return s_smem.slice(64, 64, dim=1) if TRANSPOSED else s_smem.slice(2, 2, dim=1)


@gluon.jit
def store_rows(out, y, positions, begin, end, j0, P, J, fan_out, BLOCK_M: gl.constexpr):
    """Write y [BLOCK_M, 128] to the rows begin..end of `out`, columns from j0."""
    threads: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [_WARPS, 1], [1, 0])
    rows = begin + gl.arange(0, BLOCK_M, gl.SliceLayout(1, threads))
    target, keep = row_position(rows, rows < end, positions, P, fan_out)
    j = j0 + gl.arange(0, 128, gl.SliceLayout(0, threads))
    gl.store(out + target[:, None] * J + j[None, :], y, mask=keep[:, None] & (j < J)[None, :])


@gluon.jit(
    do_not_specialize=["P", "E", "RANK", "fan_in", "stride_fe"],
    do_not_specialize_on_alignment=["stride_fr", "stride_fj"],
)
def packed_matmul_kernel(
    out,
    rows_in,
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
    reverse (TRANSPOSED). PITCH: K/2. EVEN: 128 divides C. ALIGNED: K/32 is even. HEIGHTS: see above.
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
            store_rows(out, nothing, positions, begin + first, end, j0, P, J, fan_out, 16)
        return
    for h in gl.static_range(len(HEIGHTS)):
        fits = end - begin <= HEIGHTS[h]
        larger = end - begin > HEIGHTS[h + 1] if h + 1 < len(HEIGHTS) else True
        if fits & larger:
            packed_tile(
                out, rows_in, packed, scales, low, factor, bias, positions, expert, begin, end, j0, P, C, J, PITCH,
                RANK, s, fan_in, fan_out, stride_fe, stride_fr, stride_fj, TRANSPOSED, EVEN, ALIGNED, HEIGHTS[h],
                BLOCK_R, STAGES,
            )  # fmt: skip
