"""Mutants of the portable kernels that change nothing, each with an argument that covers all inputs."""

from __future__ import annotations

from mxref.verification.studies.mutation.bug import Equivalent, at
from mxref.verification.studies.mutation.sources import Place

_NOT_STORED = (
    "The rows in question lie in 0..P-1, so nothing outside is read; `keep` stores rows below `end` only, "
    "and a row's sum meets no other row."
)
_BELOW_2_31 = (
    "The number is below 2^31: it is a column, an element of one matrix, or comes from a table of 32 bits. What it is "
    "added to, or compared with, has 64 bits."
)
_NO_ROWS = (
    "A tile with begin >= end has no row below `end`: every mask is false, nothing is stored, and the weights that are "
    "read are those of expert 0, which there always is."
)
_BITS = (
    "Shifts to the left, masks and comparisons for equality have the same bits with and without a sign, and the bits "
    "that a shift to the right fills are dropped by the conversion to 16 bits."
)
_BYTE = "NaN as a byte is 0."
_UNREAD = "A placeholder: the kernel reads it only under a compile-time condition that does not hold in this call."
_ONE_GROUP = "One element of the sum is group's, all others are 0, and none is negative: its largest is its sum."
_EMPTY_RANGE = "With begin >= 0 an end below 0 leaves the range as empty as an end of 0 does."
_FORCED = "NaN as an integer is 0 or the least one there is, and what is loaded here is forced into 0..P at once."
_BEYOND_E = (
    "Groups beyond E are counted for nobody: sums take groups below `group` or `group` itself, which is at most E."
)
_NO_TILE = "A negative length rounds to no tile: (-1 + BLOCK_M - 1) // BLOCK_M is 0 as long as BLOCK_M >= 2."
_IDLE_PROGRAMS = "Surplus programs find every row, column or group masked: they store nothing."
_NO_INVERSE = "Without an inverse the programs behind the tiles' do nothing."
_PARTS = "However the inverse is divided among programs, each of its entries is in one part."
_EMPTY_TABLES = "Without rows there is no tile and no entry, for whatever programs."
_KEYS = "They only tell one launch from another, in whatever order."
_DROPPED_LANE = "A lane whose load is masked is masked in the store too, and no lane meets another."
_NAN = 'float("nan")'

PORTABLE: tuple[tuple[Place, Equivalent], ...] = (
    *at(Place("device/activation.py", "sigmoids"),
        Equivalent("t >= 0", ["t > 0"], "At t = 0 the power is 1, and both of what is chosen from are 1/2.")),
    *at(Place("device/decode.py", "e2m1"), Equivalent("tl.uint32", ["tl.int32"], _BITS)),
    *at(Place("device/decode.py", "e8m0"),
        Equivalent("tl.uint32", ["tl.int32"], _BITS, "b = ..."),
        Equivalent("tl.uint32", ["tl.int32"], _BITS, "return ...")),
    *at(Place("device/decode.py", "narrow"), Equivalent("tl.uint32", ["tl.int32"], _BITS)),
    *at(Place("device/decode.py", "load_mxfp4_tile"),
        Equivalent("nibbles & 0xF", ["nibbles"], "`e2m1` reads a code's four low bits and no other."),
        Equivalent("0", [_NAN], _BYTE, "nibbles = ..."),
        Equivalent("0", [_NAN], _BYTE, "scale = ..."),
        Equivalent("tl.float32", ["tl.float16"],
            "Whoever calls this converts to fp16 or to fp32 next, and both hold an fp16 value as it is.")),
    *at(Place("device/dequant.py", "dequantize_kernel"),
        Equivalent("WORDS * 8", ["WORDS", "WORDS * (8 - 1)"],
            "More chunks than there are: in the surplus ones every word lies outside and is masked."),
        Equivalent("(chunk % chunks).to(tl.int64)", ["(chunk % chunks).to(tl.int32)"],
            "An element of one expert's matrix has a 32-bit number by contract (see `memory`); what is added to it, the "
            "expert's and the slot's offset, is 64 bits wide."),
        Equivalent("0", [_NAN], _DROPPED_LANE, "codes = ..."),
        Equivalent("0", [_NAN], _DROPPED_LANE, "scale = ..."),
        Equivalent("... & 0xF", ["..."], "`e2m1` reads the four lowest bits alone.")),
    *at(Place("device/grouped_matmul.py", "grouped_matmul_kernel"),
        Equivalent("tl.int64", ["tl.int32"], _BELOW_2_31, "end = ..."),
        Equivalent("begin >= end", ["False", "begin > end"], _NO_ROWS),
        Equivalent("return", ["pass"], _NO_ROWS),
        Equivalent("rows < end", ["rows < P"], _NOT_STORED, "source, live = ..."),
        Equivalent("tl.dot(l_tile, f_tile, acc, ...)", ["tl.dot(l_tile, f_tile, ...)"],
            "The accumulator is zero here, and a dot without one starts from zero."),
        Equivalent("tl.int64", ["tl.int32"], _BELOW_2_31, "c = ..."),
        Equivalent("0", [_NAN], "A column beyond J is not stored and meets no other.", "acc += ...")),
    *at(Place("device/grouped_matmul.py", "GroupedMatmul.__init__"),
        Equivalent("(0, 0, 0)", ["(0 + 1, 0, 0)", "(0 - 1, 0, 0)", "(0, 0 + 1, 0)", "(0, 0 - 1, 0)", "(0, 0, 0 + 1)", "(0, 0, 0 - 1)"], _UNREAD),
        Equivalent("(0, (0, 0, 0))", ["(0 + 1, (0, 0, 0))", "(0 - 1, (0, 0, 0))"], _UNREAD)),
    *at(Place("device/grouped_outer.py", "grouped_outer"),
        Equivalent("(0, None, 0, 0, 0)", ["(0 + 1, None, 0, 0, 0)", "(0 - 1, None, 0, 0, 0)"],
            f"{_UNREAD} One column more would be one program an expert more. {_IDLE_PROGRAMS}"),
        Equivalent("(0, None, 0, 0, 0)",
            ["(0, None, 0 + 1, 0, 0)", "(0, None, 0 - 1, 0, 0)", "(0, None, 0, 0 + 1, 0)", "(0, None, 0, 0 - 1, 0)",
             "(0, None, 0, 0, 0 + 1)", "(0, None, 0, 0, 0 - 1)"], _UNREAD)),
    *at(Place("device/grouped_outer.py", "grouped_sum_kernel"),
        Equivalent("tl.int64", ["tl.int32"], _BELOW_2_31, "j = ...")),
    *at(Place("device/schedule.py", "expert_rows"),
        Equivalent("tl.load(..., mask=..., other=0)", ['tl.load(..., mask=..., other=float("nan"))'], _FORCED),
        Equivalent("0", ["0 - 1"], _EMPTY_RANGE, "tl.maximum(end, 0)")),
    *at(Place("device/schedule.py", "write_tiles"),
        Equivalent("tl.load(..., mask=..., other=0)", ['tl.load(..., mask=..., other=float("nan"))'], _FORCED),
        Equivalent("0", ["0 - 1"], _EMPTY_RANGE, "tl.maximum(ends, 0)"),
        Equivalent("0", ["0 - 1"], _NO_TILE, "tl.maximum(ends - begins, 0)"),
        Equivalent("tl.where(g <= E, ..., 0)", ["tl.where(g <= E, ..., 0 + 1)", "tl.where(g <= E, ..., 0 - 1)"], _BEYOND_E),
        Equivalent("range(surplus * 3, bound * 3, TILES)", ["range(surplus * 3, bound * (3 + 1), TILES)"],
            "What is behind the table is masked."),
        Equivalent("tl.sum", ["tl.max"], _ONE_GROUP, "mine = ..."),
        Equivalent("tl.sum", ["tl.max"], _ONE_GROUP, "begin = ..."),
        Equivalent("tl.sum", ["tl.max"], _ONE_GROUP, "end = ...")),
    *at(Place("device/schedule.py", "tables_kernel"),
        Equivalent("tl.int64", ["tl.int32"],
            "Programs times `span` is at most P + span, in 32 bits as the entries of the tables do themselves.", "write_inverse(...)")),
    *at(Place("device/schedule.py", "_tables"),
        Equivalent("1", ["1 + 1"], _BEYOND_E, "triton.next_power_of_2(E + 1)"),
        Equivalent("max(4096, 16 * triton.cdiv(P, 256))", ["max(16 * triton.cdiv(P, 256), 4096)"], _PARTS),
        Equivalent("4096", ["4096 + 1", "4096 - 1"], _PARTS, "max(...)"),
        Equivalent("16 * triton.cdiv(P, 256)", ["16", "triton.cdiv(P, 256)"], _PARTS),
        Equivalent("16", ["16 + 1", "16 - 1"], _PARTS, "max(...)"),
        Equivalent("256", ["256 + 1", "256 - 1"], _PARTS),
        Equivalent("1", ["1 + 1"], _IDLE_PROGRAMS, "programs = ..."),
        Equivalent("with_inverse", ["True"], _NO_INVERSE),
        Equivalent("0", ["0 + 1"], _IDLE_PROGRAMS, "triton.cdiv(P, span) if with_inverse else 0"),
        Equivalent("P", ["True"], _EMPTY_TABLES, "programs if P else 0"),
        Equivalent("0", ["0 + 1"], _EMPTY_TABLES, "programs if P else 0")),
    *at(Place("device/schedule.py", "Routing._make"),
        Equivalent("_tables(self.P, self.E, block_m, known is None, offsets.device, positions.dtype, offsets.dtype)",
            ["_tables(self.P, self.E, block_m, offsets.device, known is None, positions.dtype, offsets.dtype)"], _NO_INVERSE),
        Equivalent("_tables(self.P, self.E, block_m, known is None, offsets.device, positions.dtype, offsets.dtype)",
            ["_tables(self.P, self.E, block_m, known is None, positions.dtype, offsets.device, offsets.dtype)",
             "_tables(self.P, self.E, block_m, known is None, offsets.device, offsets.dtype, positions.dtype)"],
            _KEYS),
        Equivalent("known is None", ["True"],
            "Of a table that is known no entry belongs to a program: E + 1 are started.", "launch(...)")),
    *at(Place("device/slots.py", "spread_kernel"),
        Equivalent("0", [_NAN], "A row that is not live is not stored, and its share of dgates is taken before the gate.",
            "tl.load(gates + position, ...)")),
    *at(Place("device/slots.py", "combine"),
        Equivalent("_combine(routing.P, tokens, J, out.device, out.dtype, rows_in.dtype, gate_dtype)",
            ["_combine(routing.P, tokens, J, out.dtype, out.device, rows_in.dtype, gate_dtype)",
             "_combine(routing.P, tokens, J, out.device, rows_in.dtype, out.dtype, gate_dtype)",
             "_combine(routing.P, tokens, J, out.device, out.dtype, gate_dtype, rows_in.dtype)"], _KEYS)),
    *at(Place("device/slots.py", "_spread"), Equivalent("16", ["16 - 1"], _IDLE_PROGRAMS, "triton.cdiv(...)")),
    *at(Place("device/slots.py", "_combine"),
        Equivalent("16", ["16 - 1"], _IDLE_PROGRAMS, "triton.cdiv(tokens, 16)"),
        Equivalent("128", ["128 - 1"], _IDLE_PROGRAMS, "triton.cdiv(J, 128)"),
        Equivalent("max(tokens, 1)", ["max(1, tokens)"], "The larger of two numbers, whichever comes first.")),
)  # fmt: skip
