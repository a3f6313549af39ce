"""Mutants of the kernel for Hopper, and of the way to it, that change nothing."""

from __future__ import annotations

from mxref.verification.studies.mutation.equivalence import Equivalent, each

__all__ = ["HOPPER"]

_LORA_FIRST = "LORA_FIRST: gl.constexpr = {}  # its operand then shares memory with the ring"
_BOX = "kernel, own = packed_matmul_kernel, _hopper_arguments({} if {} else None, weight, config)"

_LARGER = "larger = {} if {} else True"
_BOXED = "out, rows_in, rows_box if {} else None, packed, scales, low, factor, bias, positions, expert,"
_TWO = "return gl.load(at.to(gl.pointer_type(gl.uint16)), mask=rows & (left > {}), other={})"
_LOW = "low = gl.load(at, mask=rows & ({}), other=0).to(gl.uint16)"
_HIGH = "return low | (gl.load(at + 1, mask=rows & (left > {}), other=0).to(gl.uint16) << 8)"

_AGAIN = (
    "Every tile is computed at the height that is right for it, and at others besides; the chain is the same at every "
    "height, and rows from `end` on are masked."
)
_COPIES = "Rows that do not come as a box come by copies of 16 bytes: the same numbers, later."
_EVEN = "EVEN says that the masks left out are true everywhere."
_ODD = "Not ALIGNED: K/32 is odd, and so is `left`, from which only even numbers are taken: never 0, never 2."
_SURPLUS = "A surplus tile is expert 0's without rows: nothing of it is stored."

HOPPER: tuple[Equivalent, ...] = (
    Equivalent(
        "grouped_matmul",
        "if not isinstance(weight, PackedMatrix) or C % 16:  # Hopper copies 16 bytes; Triton knows multiples of 16 "
        "elements",
        "if True:  # Hopper copies 16 bytes; Triton knows multiples of 16 elements",
        "Every product then takes the portable kernel, whose chain is the same: slower, and no bit differs.",
    ),
    Equivalent(
        "grouped_matmul",
        _BOX.format("rows_in", "fan_in is None"),
        _BOX.format("rows_in", "False"),
        _COPIES,
    ),
    Equivalent("copy_rows", "if EVEN:", "if False:", _EVEN),
    Equivalent("copy_bytes", "if EVEN:", "if False:", _EVEN),
    *each(
        "packed_tile",
        _LORA_FIRST.format("low is not None and BLOCK_R > 16"),
        (
            _LORA_FIRST.format(condition)
            for condition in (
                "((low is not None) or (BLOCK_R > 16))",
                "(low is not None)",
                "(BLOCK_R > 16)",
                "low is not None and ((BLOCK_R) >= (16))",
                "low is not None and BLOCK_R > (16 + 1)",
                "low is not None and BLOCK_R > (16 - 1)",
            )
        ),
        "BLOCK_R is 16 without an adapter, and a power of two. Multiplied before the first copies or after them, "
        "s·LoRA is in the accumulator before the first step.",
    ),
    *each(
        "packed_tile",
        "gl.assume(steps > 0)",
        ("gl.assume(((steps) >= (0)))", "gl.assume(steps > (0 - 1))"),
        "A weaker promise to the compiler.",
    ),
    Equivalent(
        "lora_product",
        "return hopper.warpgroup_mma_wait(0, [acc]) * s",
        "return hopper.warpgroup_mma_wait((0 + 1), [acc]) * s",
        "The assembler sees the accumulator read too early, and then waits after every wgmma by itself.",
    ),
    Equivalent(
        "packed_tile",
        "async_copy.wait_group(STAGES - 2)",
        "async_copy.wait_group(STAGES - (2 + 1))",
        "More copies are waited for than the next products need.",
    ),
    *(
        Equivalent(
            "packed_tile", wait.format("1"), wait.format("(1 - 1)"), "More products are waited for than need be."
        )
        for wait in (
            "acc, a1 = hopper.warpgroup_mma_wait({}, [acc, a1])",
            "acc, a0 = hopper.warpgroup_mma_wait({}, [acc, a0])",
        )
    ),
    *each(
        "packed_tile",
        "async_copy.wait_group(0)",
        ("async_copy.wait_group((0 + 1))", "async_copy.wait_group((0 - 1))"),
        "Every turn waits for the copies that it reads; the groups that are open behind the last turn are empty.",
    ),
    Equivalent(
        "packed_tile",
        "mbarrier.wait(filled.index(stage), (i // 2) // STAGES & 1)",
        "mbarrier.wait(filled.index(stage), ((i // 2) // STAGES))",
        "The instruction takes the parity from the highest bit of a register, to which the assembler shifts the lowest "
        "one of whatever it is given.",
    ),
    *each(
        "packed_tile",
        "if rows_box is None:",
        ("if True:", "if False:", "if ((rows_box) is not (None)):"),
        "The compiler puts this fence before a product that reads shared memory wherever the source has none; boxes "
        "need none, and lose only time by one.",
        "hopper.fence_async_shared()",
    ),
    Equivalent(
        "packed_tile",
        "acc += gl.load(bias + expert * J + j, mask=j < J, other=0.0).to(gl.float32)[:, None]",
        'acc += gl.load(bias + expert * J + j, mask=j < J, other=float("nan")).to(gl.float32)[:, None]',
        "Columns from J on are computed and not stored.",
    ),
    *each("packed_matmul_kernel", "if begin >= end:", ("if False:", "if ((begin) > (end)):"), _SURPLUS),
    Equivalent("packed_matmul_kernel", "return", "pass", _SURPLUS, "if expert >= E:"),
    Equivalent(
        "packed_matmul_kernel",
        "for first in range(0, HEIGHTS[0], 16):",
        "for first in range(0, HEIGHTS[0], (16 - 1)):",
        "Some rows of zeros are written twice; rows from `end` on are masked.",
    ),
    *each(
        "packed_matmul_kernel",
        _LARGER.format("end - begin > HEIGHTS[h + 1]", "h + 1 < len(HEIGHTS)"),
        (
            _LARGER.format("end - begin > HEIGHTS[h + 1]", "False"),
            _LARGER.format("end - begin > HEIGHTS[h + 1]", "h + (1 + 1) < len(HEIGHTS)"),
            _LARGER.format("((end - begin) >= (HEIGHTS[h + 1]))", "h + 1 < len(HEIGHTS)"),
            _LARGER.format("((end) + (begin)) > HEIGHTS[h + 1]", "h + 1 < len(HEIGHTS)"),
            _LARGER.format("(end) > HEIGHTS[h + 1]", "h + 1 < len(HEIGHTS)"),
        ),
        _AGAIN,
    ),
    Equivalent(
        "packed_matmul_kernel",
        _LARGER.format("end - begin > HEIGHTS[h + 1]", "h + 1 < len(HEIGHTS)"),
        _LARGER.format("end - begin > HEIGHTS[((h) - (1))]", "h + 1 < len(HEIGHTS)"),
        "At h = 0 this asks for more rows than the lowest tile holds: those take the tallest, fewer the lowest, and "
        "none of the others. The chain is the same at every height.",
    ),
    *each(
        "packed_matmul_kernel",
        "if fits & larger:",
        ("if True:", "if ((fits) | (larger)):", "if (fits):", "if (larger):"),
        _AGAIN,
    ),
    *each(
        "packed_matmul_kernel",
        _BOXED.format("h == 0"),
        (_BOXED.format("False"), _BOXED.format("h == (0 - 1)")),
        _COPIES,
    ),
    Equivalent(
        "load_scales",
        "if ALIGNED:",
        "if False:",
        "Two bytes, each by its own mask, in place of both at once.",
    ),
    Equivalent(
        "load_scales",
        _TWO.format("0", "0"),
        _TWO.format("(0 + 1)", "0"),
        "ALIGNED: K/32 is even, and so is `left`, from which only even numbers are taken.",
    ),
    Equivalent(
        "load_scales",
        _TWO.format("0", "0"),
        _TWO.format("0", 'float("nan")'),
        "The load then gives fp32, which holds 16 bits exactly, and its NaN becomes the integer 0.",
    ),
    *each(
        "load_scales",
        _LOW.format("left > 0"),
        (_LOW.format("((left) >= (0))"), _LOW.format("left > (0 - 1)")),
        _ODD,
    ),
    Equivalent("load_scales", _HIGH.format("1"), _HIGH.format("(1 + 1)"), _ODD),
)
