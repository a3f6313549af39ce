"""Mutants that change nothing, each with an argument that covers all inputs.

An entry names a mutant by what a reader sees: the function and the edited lines before and after. A declared mutant
must besides give the same bits as the sources do on every fixture; one that a guard rejects was no equivalent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mxref.verification.studies.mutation.equivalence import Equivalent, each
from mxref.verification.studies.mutation.equivalents_hopper import HOPPER
from mxref.verification.studies.mutation.mutant import Mutant, Source

__all__ = ["EQUIVALENTS", "argument_for", "stale"]


_MATMUL, _TILES = "grouped_matmul_kernel", "tiles_kernel"

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
_CACHE = "The table is a function of the routing and the height alone: made anew it is the same."
_BITS = (
    "Shifts to the left, masks and comparisons for equality have the same bits with and without a sign, and the bits "
    "that a shift to the right fills are dropped by the conversion to 16 bits."
)
_BYTE = "NaN as a byte is 0."
_WHOLE_BLOCKS = (
    "COLS is a power of two in 32..512, for which COLS // 31 and COLS // 32 are the same compile-time number."
)
_UNREAD = "A placeholder: the kernel reads it only under a compile-time condition that does not hold in this call."
_ONE_GROUP = "One element of the sum is group's, all others are 0, and none is negative: its largest is its sum."
_EMPTY_RANGE = "With begin >= 0 an end below 0 leaves the range as empty as an end of 0 does."
_FORCED = "NaN as an integer is 0 or the least one there is, and what is loaded here is forced into 0..P at once."
_BEYOND_E = (
    "Groups beyond E are counted for nobody: sums take groups below `group` or `group` itself, which is at most E."
)
_NO_TILE = "A negative length rounds to no tile: (-1 + BLOCK_M - 1) // BLOCK_M is 0 as long as BLOCK_M >= 2."
_IDLE_PROGRAMS = "Surplus programs find every row, column or group masked: they store nothing."
_NO_SLOTS = "Only a call without tokens tells these apart, and it starts no program."

_SCALED = '"RANK": rank, "s": float(lora.scaling) if lora else {}, "fan_in": fan_in, "fan_out": fan_out,'

_DROPPED_LANE = "A lane whose load is masked is masked in the store too, and no lane meets another."

EQUIVALENTS: tuple[Equivalent, ...] = (
    Equivalent(
        "dequantize_kernel",
        "word = (chunk % chunks).to(tl.int64) * WORDS + tl.arange(0, WORDS)",
        "word = (chunk % chunks).to(tl.int32) * WORDS + tl.arange(0, WORDS)",
        "An element of one expert's matrix has a 32-bit number by contract (see `memory`); what is added to it, the "
        "expert's and the slot's offset, is 64 bits wide.",
    ),
    *each(
        "dequantize_kernel",
        "chunks = tl.cdiv(size, WORDS * 8)",
        ("chunks = tl.cdiv(size, (WORDS))", "chunks = tl.cdiv(size, WORDS * (8 - 1))"),
        "More chunks than there are: in the surplus ones every word lies outside and is masked.",
    ),
    Equivalent(
        "dequantize_kernel",
        "nibbles = (codes[:, None] >> (4 * tl.arange(0, 8))[None, :]) & 0xF",
        "nibbles = (codes[:, None] >> (4 * tl.arange(0, 8))[None, :])",
        "`e2m1` reads the four lowest bits alone.",
    ),
    *(
        Equivalent("dequantize_kernel", load.format("0"), load.format('float("nan")'), _DROPPED_LANE)
        for load in (
            "codes = tl.load(words + expert * (size // 8) + word, mask=inside, other={})",
            "scale = tl.load(scales + expert * (size // 32) + word // 4, mask=inside, other={})",
        )
    ),
    Equivalent(
        _MATMUL,
        "source, live = source_rows(rows, rows < end, positions, fan_in, P)",
        "source, live = source_rows(rows, rows < P, positions, fan_in, P)",
        _NOT_STORED,
    ),
    Equivalent(_MATMUL, "return", "pass", _NO_ROWS),
    *each(_MATMUL, "if begin >= end:", ("if False:", "if ((begin) > (end)):"), _NO_ROWS),
    Equivalent(
        _MATMUL,
        'acc = tl.dot(l_tile, f_tile, acc, input_precision="ieee") * s',
        'acc = tl.dot(l_tile, f_tile, input_precision="ieee") * s',
        "The accumulator is zero here, and a dot without one starts from zero.",
    ),
    Equivalent(
        _MATMUL,
        "end = tl.load(tiles + tile * 3 + 2).to(tl.int64)",
        "end = tl.load(tiles + tile * 3 + 2).to(tl.int32)",
        _BELOW_2_31,
    ),
    Equivalent(
        _MATMUL,
        "c = (c0 + tl.arange(0, BLOCK_K)).to(tl.int64)",
        "c = (c0 + tl.arange(0, BLOCK_K)).to(tl.int32)",
        _BELOW_2_31,
    ),
    Equivalent(
        _MATMUL,
        "acc += tl.load(bias + expert * J + j, mask=in_J, other=0).to(tl.float32)[None, :]",
        'acc += tl.load(bias + expert * J + j, mask=in_J, other=float("nan")).to(tl.float32)[None, :]',
        "A column beyond J is not stored and meets no other.",
    ),
    *each(
        "grouped_matmul",
        "factor_strides = factor.stride() if factor is not None else (0, 0, 0)",
        (
            f"factor_strides = factor.stride() if factor is not None else {strides}"
            for strides in (
                "((0 + 1), 0, 0)",
                "((0 - 1), 0, 0)",
                "(0, (0 + 1), 0)",
                "(0, (0 - 1), 0)",
                "(0, 0, (0 + 1))",
                "(0, 0, (0 - 1))",
            )
        ),
        _UNREAD,
    ),
    *each(
        "grouped_matmul",
        "rank = factor.shape[1] if factor is not None else 0",
        (f"rank = factor.shape[1] if factor is not None else (0 {sign} 1)" for sign in "+-"),
        _UNREAD,
    ),
    *each(
        "grouped_matmul",
        _SCALED.format("1.0"),
        (_SCALED.format(f"(1.0 {sign} 1)") for sign in "+-"),
        _UNREAD,
    ),
    *HOPPER,
    Equivalent("e2m1", "codes = codes.to(tl.uint32)", "codes = codes.to(tl.int32)", _BITS),
    Equivalent("e8m0", "b = scale_bytes.to(tl.uint32)", "b = scale_bytes.to(tl.int32)", _BITS),
    Equivalent(
        "e8m0",
        "return tl.where(b == 255, NAN_BITS, bits).to(tl.uint32).to(tl.float32, bitcast=True)",
        "return tl.where(b == 255, NAN_BITS, bits).to(tl.int32).to(tl.float32, bitcast=True)",
        _BITS,
    ),
    Equivalent(
        "narrow",
        "return (w.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)",
        "return (w.to(tl.int32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)",
        _BITS,
    ),
    Equivalent(
        "load_mxfp4_tile",
        "blocks = (k0 // 32 + tl.arange(0, COLS // 32))[None, :]",
        "blocks = (k0 // 32 + tl.arange(0, COLS // (32 - 1)))[None, :]",
        _WHOLE_BLOCKS,
    ),
    *each(
        "load_mxfp4_tile",
        "codes = tl.join(nibbles & 0xF, nibbles >> 4).reshape(ROWS, COLS // 32, 32)",
        ("codes = tl.join(nibbles & 0xF, nibbles >> 4).reshape(ROWS, COLS // (32 - 1), 32)",),
        _WHOLE_BLOCKS,
    ),
    Equivalent(
        "load_mxfp4_tile",
        "codes = tl.join(nibbles & 0xF, nibbles >> 4).reshape(ROWS, COLS // 32, 32)",
        "codes = tl.join((nibbles), nibbles >> 4).reshape(ROWS, COLS // 32, 32)",
        "`e2m1` reads a code's four low bits and no other.",
    ),
    Equivalent(
        "load_mxfp4_tile",
        "return w.to(tl.float16).to(tl.float32)",
        "return w.to(tl.float16).to(tl.float16)",
        "Whoever calls this converts to fp16 or to fp32 next, and both hold an fp16 value as it is.",
    ),
    Equivalent(
        "load_mxfp4_tile",
        "nibbles = tl.load(packed + row * (K // 2) + pairs, mask=inside & (pairs < K // 2), other=0)",
        'nibbles = tl.load(packed + row * (K // 2) + pairs, mask=inside & (pairs < K // 2), other=float("nan"))',
        _BYTE,
    ),
    Equivalent(
        "load_mxfp4_tile",
        "scale = tl.load(scales + row * (K // 32) + blocks, mask=inside & (blocks < K // 32), other=0)",
        'scale = tl.load(scales + row * (K // 32) + blocks, mask=inside & (blocks < K // 32), other=float("nan"))',
        _BYTE,
    ),
    Equivalent(
        "grouped_sum_kernel",
        "j = ((tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)",
        "j = ((tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int32)",
        _BELOW_2_31,
    ),
    Equivalent(
        "expert_rows",
        "return tl.minimum(tl.maximum(begin, 0), P), tl.minimum(tl.maximum(end, 0), P)",
        "return tl.minimum(tl.maximum(begin, 0), P), tl.minimum(tl.maximum(end, (0 - 1)), P)",
        _EMPTY_RANGE,
    ),
    Equivalent(
        "expert_rows",
        "begin = tl.load(offsets + expert - 1, mask=expert > 0, other=0).to(tl.int64)",
        'begin = tl.load(offsets + expert - 1, mask=expert > 0, other=float("nan")).to(tl.int64)',
        _FORCED,
    ),
    Equivalent(
        _TILES,
        "begins = tl.load(offsets + g - 1, mask=(g > 0) & (g <= E), other=0).to(tl.int64)",
        'begins = tl.load(offsets + g - 1, mask=(g > 0) & (g <= E), other=float("nan")).to(tl.int64)',
        _FORCED,
    ),
    Equivalent(
        _TILES,
        "ends = tl.minimum(tl.maximum(ends, 0), P)",
        "ends = tl.minimum(tl.maximum(ends, (0 - 1)), P)",
        _EMPTY_RANGE,
    ),
    Equivalent(
        _TILES,
        "counts = tl.where(g <= E, (tl.maximum(ends - begins, 0) + BLOCK_M - 1) // BLOCK_M, 0)",
        "counts = tl.where(g <= E, (tl.maximum(ends - begins, (0 - 1)) + BLOCK_M - 1) // BLOCK_M, 0)",
        _NO_TILE,
    ),
    *each(
        _TILES,
        "counts = tl.where(g <= E, (tl.maximum(ends - begins, 0) + BLOCK_M - 1) // BLOCK_M, 0)",
        (
            f"counts = tl.where(g <= E, (tl.maximum(ends - begins, 0) + BLOCK_M - 1) // BLOCK_M, (0 {sign} 1))"
            for sign in "+-"
        ),
        _BEYOND_E,
    ),
    Equivalent(
        _TILES,
        "mine = tl.sum(tl.where(g == group, counts, 0)).to(tl.int32)",
        "mine = tl.max(tl.where(g == group, counts, 0)).to(tl.int32)",
        _ONE_GROUP,
    ),
    Equivalent(
        _TILES,
        "begin = tl.sum(tl.where(g == group, begins, 0))",
        "begin = tl.max(tl.where(g == group, begins, 0))",
        _ONE_GROUP,
    ),
    Equivalent(
        _TILES,
        "end = tl.sum(tl.where(g == group, ends, 0))",
        "end = tl.max(tl.where(g == group, ends, 0))",
        _ONE_GROUP,
    ),
    Equivalent("Routing.tiles", "if block_m not in self._tiles:", "if True:", _CACHE),
    Equivalent("Routing.inverse", "if self._inverse is None:", "if True:", _CACHE),
    *each(
        "Routing.tiles",
        "self.E + 1 if bound else 0,",
        ("self.E + 1 if True else 0,", "self.E + (1 + 1) if bound else 0,", "self.E + 1 if bound else (0 + 1),"),
        _IDLE_PROGRAMS,
    ),
    Equivalent(
        "Routing.tiles",
        "GROUPS=triton.next_power_of_2(self.E + 1),",
        "GROUPS=triton.next_power_of_2(self.E + (1 + 1)),",
        _BEYOND_E,
    ),
    Equivalent("Routing.inverse", "triton.cdiv(self.P, 1024),", "triton.cdiv(self.P, (1024 - 1)),", _IDLE_PROGRAMS),
    Equivalent(
        "spread_kernel",
        "value = tl.load(gates + position, mask=live, other=0).to(tl.float32)[:, None] * value",
        'value = tl.load(gates + position, mask=live, other=float("nan")).to(tl.float32)[:, None] * value',
        "A row that is not live is not stored, and its share of dgates is taken before the gate.",
    ),
    Equivalent("spread", "triton.cdiv(routing.P, 16),", "triton.cdiv(routing.P, (16 - 1)),", _IDLE_PROGRAMS),
    Equivalent(
        "combine",
        "triton.cdiv(tokens, 16) * triton.cdiv(J, 128),",
        "triton.cdiv(tokens, (16 - 1)) * triton.cdiv(J, 128),",
        _IDLE_PROGRAMS,
    ),
    Equivalent(
        "combine",
        "triton.cdiv(tokens, 16) * triton.cdiv(J, 128),",
        "triton.cdiv(tokens, 16) * triton.cdiv(J, (128 - 1)),",
        _IDLE_PROGRAMS,
    ),
    *each(
        "combine",
        "slots=routing.P // max(tokens, 1),",
        ("slots=routing.P // max(1, tokens),",),
        "The larger of two numbers, whichever comes first.",
    ),
)


def argument_for(mutant: Mutant, sources: Mapping[str, Source]) -> str | None:
    """Why the mutant is declared equivalent, or None."""
    return next((entry.argument for entry in EQUIVALENTS if entry.covers(mutant, sources)), None)


def stale(mutants: Iterable[Mutant], sources: Mapping[str, Source]) -> list[Equivalent]:
    """Entries that speak of no mutant of the catalogue."""
    mutants = list(mutants)
    return [entry for entry in EQUIVALENTS if not any(entry.covers(mutant, sources) for mutant in mutants)]
