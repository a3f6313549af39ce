"""The mutants by hand in what reads the layout FRAGMENTS."""

from __future__ import annotations

from mxref.verification.studies.mutation.bug import Bug, at
from mxref.verification.studies.mutation.sources import Place

__all__ = ["FRAGMENTS_BUGS"]

FRAGMENTS_BUGS: tuple[tuple[Place, Bug], ...] = (
    *at(Place("device/hopper_unpack.py", "column_of_row"),
        Bug("adapter's columns in fragment order", "LoRA scaling", "they must follow the base's",
            "32 * warp + 16 * (g // 4) + 8 * f + 2 * (g % 4) + h", "m")),
    *at(Place("device/hopper_unpack.py", "rows_to_columns"),
        Bug("columns left as the tensor core has them", "scheduling", "a warp's 32 columns lie in two fragments",
            "y.reshape([BLOCK_M, 2, WARPS, 2, 2, 4]).permute([0, 2, 4, 1, 5, 3])",
            "y.reshape([BLOCK_M, 2, WARPS, 2, 2, 4])")),
    *at(Place("device/hopper_fragments.py", "places"),
        Bug("columns behind the last repeat nothing", "masks", "tiles of the next expert, or of nobody",
            "gl.minimum(...)",
            "group + gl.arange(0, WARPS, gl.SliceLayout(0, gl.SliceLayout(2, threads)))")),
    *at(Place("device/hopper_fragments.py", "copy_tiles"),
        Bug("tiles behind the contraction's end", "tails", "NaN scales there meet the zeros of x",
            "s_tile < left", "s_tile < left + 1")),
    *at(Place("device/hopper_fragments.py", "fragments_tile"),
        Bug("fragments of expert 0", "expert indexing", "expert forgotten", "expert * steps * across", "0 * steps * across"),
        Bug("boxes of fragments from the rows before", "scheduling", "off by one",
            "begin.to(gl.int32)", "begin.to(gl.int32) - 1"),
        Bug("ring of fragments read before it is filled", "scheduling", "one group too few is waited for",
            "STAGES - 2", "STAGES - 1"),
        Bug("ring of fragments filled while it is read", "scheduling", "the stage that is read, not the one before",
            "stage, free, phase = 0, STAGES - 1, 0", "stage, free, phase = 0, 0, 0"),
        Bug("every tile multiplied by the first one's rows", "accumulation", "the step's offset forgotten",
            "t % 2 * 32", "0"),
        Bug("bias of expert 0 on fragments", "biases", "expert forgotten", "bias + expert * J", "bias")),
    *at(Place("device/hopper_fragments.py", "fragments_matmul_kernel"),
        Bug("sentinel tiles of fragments written in part", "sentinels", "only the first sixteen rows",
            "HEIGHTS[0]", "16")),
    *at(Place("device/decode.py", "load_fragments_tile"),
        Bug("the last pair of fragments from the row's own word", "decode", "it lies in the other row's",
            "_pairs(first, second)", "_pairs(first, first)"),
        Bug("scales of fragments in the order of rows", "scales", "b lies below τ",
            "scale.reshape(GROUPS, BLOCKS, 4, 2, 2, 2).permute(0, 3, 4, 2, 5, 1)",
            "scale.reshape(GROUPS, BLOCKS, 2, 2, 4, 2).permute(0, 2, 3, 4, 5, 1)")),
)  # fmt: skip
