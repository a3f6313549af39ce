"""Mutants of the kernel for Hopper, and of the way to it, that change nothing."""

from __future__ import annotations

from mxref.verification.studies.mutation.bug import Equivalent, at
from mxref.verification.studies.mutation.sources import Place

_AGAIN = (
    "Every tile is computed at the height that is right for it, and at others besides; the chain is the same at every "
    "height, and rows from `end` on are masked."
)
_COPIES = "Rows that do not come as a box come by copies of 16 bytes: the same numbers, later."
_EVEN = "EVEN says that the masks left out are true everywhere."
_ODD = "Not ALIGNED: K/32 is odd, and so is `left`, from which only even numbers are taken: never 0, never 2."
_SURPLUS = "A surplus tile is expert 0's without rows: nothing of it is stored."
_LORA_FIRST = (
    "BLOCK_R is 16 without an adapter, and a power of two. Multiplied before the first copies or after them, s·LoRA is "
    "in the accumulator before the first step."
)
_WAITED = "More copies or products are waited for than need be."
_NAN = 'float("nan")'

HOPPER: tuple[tuple[Place, Equivalent], ...] = (
    *at(Place("device/grouped_matmul.py", "GroupedMatmul.__init__"),
        Equivalent("not isinstance(matrix, PackedMatrix) or C % 16", ["True"],
            "Every product then takes the portable kernel, whose chain is the same: slower, and no bit differs.")),
    *at(Place("device/hopper.py", "copy_rows"), Equivalent("EVEN", ["False"], _EVEN)),
    *at(Place("device/hopper.py", "copy_bytes"), Equivalent("EVEN", ["False"], _EVEN)),
    *at(Place("device/hopper.py", "lora_product"),
        Equivalent("0", ["0 + 1"],
            "The assembler sees the accumulator read too early, and then waits after every wgmma by itself.",
            "hopper.warpgroup_mma_wait(...)")),
    *at(Place("device/hopper.py", "packed_tile"),
        Equivalent("low is not None and BLOCK_R > 16", ["low is not None or BLOCK_R > 16", "low is not None", "BLOCK_R > 16"],
            _LORA_FIRST),
        Equivalent("BLOCK_R > 16", ["BLOCK_R >= 16", "BLOCK_R > 16 + 1", "BLOCK_R > 16 - 1"], _LORA_FIRST),
        Equivalent("steps > 0", ["steps >= 0", "steps > 0 - 1"], "A weaker promise to the compiler."),
        Equivalent("STAGES - 2", ["STAGES - (2 + 1)"], _WAITED),
        Equivalent("... // STAGES & 1", ["... // STAGES"],
            "The instruction takes the parity from the highest bit of a register, to which the assembler shifts the lowest "
            "one of whatever it is given."),
        Equivalent("rows_box is None", ["True", "False", "rows_box is not None"],
            "The compiler puts this fence before a product that reads shared memory wherever the source has none; boxes "
            "need none, and lose only time by one.", "if rows_box is None: hopper.fence_async_shared()"),
        Equivalent("1", ["1 - 1"], _WAITED, "hopper.warpgroup_mma_wait(1, [acc, a1])"),
        Equivalent("1", ["1 - 1"], _WAITED, "hopper.warpgroup_mma_wait(1, [acc, a0])"),
        Equivalent("0", ["0 + 1", "0 - 1"],
            "Every turn waits for the copies that it reads; the groups that are open behind the last turn are empty.",
            "async_copy.wait_group(0)"),
        Equivalent("0.0", [_NAN], "Columns from J on are computed and not stored.")),
    *at(Place("device/hopper.py", "packed_matmul_kernel"),
        Equivalent("begin >= end", ["False", "begin > end"], _SURPLUS),
        Equivalent("return", ["pass"], _SURPLUS, "if begin >= end: return"),
        Equivalent("16", ["16 - 1"], "Some rows of zeros are written twice; rows from `end` on are masked.", "range(...)"),
        Equivalent("h + 1 < len(HEIGHTS)", ["False", "h + (1 + 1) < len(HEIGHTS)"], _AGAIN),
        Equivalent("end - begin > ...", ["end - begin >= ...", "end + begin > ...", "end > ..."], _AGAIN),
        Equivalent("HEIGHTS[h + 1]", ["HEIGHTS[h - 1]"],
            "At h = 0 this asks for more rows than the lowest tile holds: those take the tallest, fewer the lowest, and "
            "none of the others. The chain is the same at every height."),
        Equivalent("fits & larger", ["True", "fits | larger", "fits", "larger"], _AGAIN),
        Equivalent("h == 0", ["False", "h == 0 - 1"], _COPIES)),
    *at(Place("device/hopper_decode.py", "load_scales"),
        Equivalent("ALIGNED", ["False"], "Two bytes, each by its own mask, in place of both at once."),
        Equivalent("left > 0", ["left > 0 + 1"],
            "ALIGNED: K/32 is even, and so is `left`, from which only even numbers are taken.",
            "return gl.load(...)"),
        Equivalent("gl.load(..., mask=..., other=0)", ['gl.load(..., mask=..., other=float("nan"))'],
            "The load then gives fp32, which holds 16 bits exactly, and its NaN becomes the integer 0.",
            "return gl.load(...)"),
        Equivalent("left > 0", ["left >= 0", "left > 0 - 1"], _ODD, "low = ..."),
        Equivalent("left > 1", ["left > 1 + 1"], _ODD)),
)  # fmt: skip
