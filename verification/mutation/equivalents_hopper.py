"""Mutants of the kernel for Hopper, and of the way to it, that change nothing."""

from __future__ import annotations

from mxref.verification.mutation.equivalence import Equivalent, each

__all__ = ["HOPPER"]

_LORA_FIRST = "LORA_FIRST: gl.constexpr = {}  # its operand then shares memory with the ring"
_BOX = "kernel, own = packed_matmul_kernel, _hopper_arguments({} if {} else None, weight, config)"

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
        "Rows that do not come as a box come by copies of 16 bytes: the same numbers, later.",
    ),
    *each("copy_rows", "if EVEN:", ("if False:",), "EVEN says that the masks left out are true everywhere."),
    *each("copy_bytes", "if EVEN:", ("if False:",), "EVEN says that the masks left out are true everywhere."),
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
)
