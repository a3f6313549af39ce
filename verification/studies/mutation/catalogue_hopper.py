"""The mutants by hand in the kernel for Hopper; only a GPU shows them."""

from __future__ import annotations

from dataclasses import replace

from mxref.verification.studies.mutation.mutant import Bug

__all__ = ["HOPPER_BUGS"]

_BUGS = [
    Bug("NaN scale made infinite", "device/hopper_decode.py", "((b + 1) & 0xFE) == 0, 0x40", "b == 0, 0x40", "scales",
        "255 << 7 reads as infinity"),
    Bug("scale byte 0 made zero", "device/hopper_decode.py", "((b + 1) & 0xFE) == 0, 0x40", "b == 255, 0x40", "scales",
        "0 << 7 reads as zero, 2^-127 is a subnormal"),
    Bug("low codes of Y lost", "device/hopper_decode.py", "mul.lo.u32 t, $1, 0x1001;", "mul.lo.u32 t, $1, 0x1000;", "decode",
        "only one of the two copies of the byte"),
    Bug("high codes of dX with the wrong sign", "device/hopper_decode.py", "mul.lo.u32 t, t, 0x0104;",
        "mul.lo.u32 t, t, 0x0004;", "decode", "the sign bit's copy is missing"),
    Bug("both codes of a byte from its low nibble", "device/hopper_decode.py", "and.b32 t, $2, 0x00F000F0;",
        "and.b32 t, $2, 0x000F000F; shl.b32 t, t, 4;", "decode", "copied from the line above"),
    Bug("columns of dX left as the tensor core has them", "device/hopper.py",
        "y.reshape([BLOCK_M, 8, 2, 8]).permute([0, 1, 3, 2])", "y.reshape([BLOCK_M, 8, 2, 8])", "scheduling",
        "the two codes of a byte are eight columns apart"),
    Bug("adapter of dX in plain column order", "device/hopper_decode.py",
        "return m & ~15 | (m & 7) << 1 | (m >> 3) & 1", "return m", "LoRA scaling",
        "its columns must follow the base's"),
    Bug("last row of a Hopper tile unwritten", "device/hopper.py",
        "target, keep = row_position(rows, rows < end, positions, P, fan_out)",
        "target, keep = row_position(rows, rows < end - 1, positions, P, fan_out)", "tails", "off by one"),
    Bug("full tiles match no height", "device/hopper.py", "fits = end - begin <= HEIGHTS[h]",
        "fits = end - begin < HEIGHTS[h]", "scheduling", "off by one: nothing is computed"),
    Bug("scales of the last iteration masked", "device/hopper.py", "C, J, i + 4, TRANSPOSED, ALIGNED)",
        "C, J, i + 6, TRANSPOSED, ALIGNED)", "masks", "one iteration too many ahead"),
    Bug("ring read before it is filled", "device/hopper.py", "async_copy.wait_group(STAGES - 2)",
        "async_copy.wait_group(STAGES - 1)", "scheduling", "one group too few is waited for"),
    Bug("bias of expert 0 on Hopper", "device/hopper.py", "bias + expert * J + j", "bias + j", "biases", "expert forgotten"),
    Bug("sentinel tiles written in part", "device/hopper.py", "for first in range(0, HEIGHTS[0], 16):",
        "for first in range(0, 16, 16):", "sentinels", "only the first sixteen rows"),
    Bug("scaling dropped on Hopper", "device/hopper.py", "hopper.warpgroup_mma_wait(0, [acc]) * s",
        "hopper.warpgroup_mma_wait(0, [acc])", "LoRA scaling", "s forgotten"),
    Bug("adapter of expert 0 on Hopper", "device/hopper.py", "factor + expert * stride_fe", "factor + 0 * stride_fe",
        "expert indexing", "expert forgotten"),
    Bug("contraction rounded down to steps", "device/hopper.py", "steps = gl.cdiv(C, STEP)", "steps = C // STEP", "tails",
        "the last 32 of an odd number of blocks"),
    Bug("weights of expert 0 on Hopper", "device/hopper.py", "packed + (expert * J + w_n)[:, None] * PITCH",
        "packed + w_n[:, None] * PITCH", "expert indexing", "expert forgotten"),
    Bug("scales of dX from the wrong blocks", "device/hopper.py", "s_b += j0 // 32", "s_b += j0 // 64", "scales",
        "a block is 32 columns"),
    Bug("second step multiplied by the first one's rows", "device/hopper.py",
        "acc = hopper.warpgroup_mma(a1, x1.index(stage).permute([1, 0]), acc, is_async=True)",
        "acc = hopper.warpgroup_mma(a1, x0.index(stage).permute([1, 0]), acc, is_async=True)", "accumulation",
        "both steps multiply the first one's rows"),
    Bug("box fetched from the rows before", "device/hopper.py", "first = begin.to(gl.int32)", "first = begin.to(gl.int32) - 1",
        "scheduling", "off by one"),
    Bug("second box equals the first", "device/hopper.py",
        "tma.async_copy_global_to_shared(rows_box, [row, k + STEP], filled, x1)",
        "tma.async_copy_global_to_shared(rows_box, [row, k], filled, x1)", "accumulation",
        "the step's offset forgotten"),
    Bug("boxes read in the phase before", "device/hopper.py", "mbarrier.wait(filled.index(stage), (i // 2) // STAGES & 1)",
        "mbarrier.wait(filled.index(stage), ((i // 2) // STAGES + 1) & 1)", "scheduling",
        "a barrier's other phase is long over"),
    Bug("gathered rows fetched as a box", "device/grouped_matmul.py", "rows_in if fan_in is None else None", "rows_in",
        "scheduling", "a box's rows are neighbours in memory, routed rows are not"),
    Bug("narrow rows copied in 16 bytes", "device/grouped_matmul.py", "if not isinstance(weight, PackedMatrix) or C % 16:",
        "if not isinstance(weight, PackedMatrix):", "tails", "rows of dY then are no multiple of 16 bytes"),
]  # fmt: skip

HOPPER_BUGS: tuple[Bug, ...] = tuple(replace(bug, gpu_only=True) for bug in _BUGS)
