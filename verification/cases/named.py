"""Cases enumerated by hand, each for what its name says, small enough for the interpreter: cases as data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mxref.verification.cases.call import Call
from mxref.verification.cases.case import Case
from mxref.verification.cases.rounded import rounded
from mxref.verification.cases.routing import ABOUT_TILES as ROWS_ABOUT_TILES
from mxref.verification.cases.scope import Scope
from mxref.verification.cases.small import FULL_OF_COLUMNS

FUSED = {"use_fused_dX": True, "use_fused_gather": True}
LONG = Case("", 2, 32, 32, 24, 1, 4, data="balanced")
"""What one size at a time makes long, see `crossings`."""
ABOUT_TILES = Case(
    "integer, experts of about a tile", len(ROWS_ABOUT_TILES), 32, 32, sum(ROWS_ABOUT_TILES), 1, 2, data="integer",
    scaling=0.5, bias=True, routing="about_tiles",
)  # fmt: skip

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_SIZES = Case("integer", 4, 64, 96, 20, 2, 16, _BF16, data="integer", scaling=0.5, bias=True)
"""Sizes that leave over behind whole tiles what real models' do: 2880 is 64 more than a multiple of 128, and an odd
number of steps of 64; 5760 an odd number of tiles of 128."""
_SIDE_BY_SIDE = replace(_SIZES, name="integer, experts side by side", dense=True, call=Call(weights="middle"))
_LONG_SUMS = (
    replace(_SIZES, name="integer, K 2112", K=2112, N=64, top_k=1),
    replace(_SIZES, name="integer, K 8224", K=8224, N=32, dtype=_FP16, tokens=10, rank=4),
    replace(_SIZES, name="integer, N 2112", K=64, N=2112, top_k=1, dtype=_FP16),
    replace(_SIZES, name="integer, N 6113", K=32, N=6113, tokens=10, rank=4, gate_slots=2),
    replace(_SIZES, name="integer, K 4096, beyond TF32", K=4096, N=64, top_k=1, dtype=_FP32),
    replace(_SIZES, name="integer, thousands of rows", K=576, tokens=1500, rank=72),
)
"""Where a sum in parts, or many rows, may be rounded otherwise."""
_AS_TRAINED = (
    replace(
        _SIZES,
        name="integer, as gpt-oss",
        experts=32,
        K=128,
        N=128,
        tokens=80,
        top_k=4,
        gate_slots=4,
        parameter_dtype=_FP32,
    ),
    replace(
        _SIZES,
        name="integer, whole tiles, sentinels",
        experts=2,
        K=256,
        N=128,
        tokens=100,
        top_k=3,
        rank=72,
        parameter_dtype=_FP32,
        routing="sentinels",
    ),
    replace(_SIZES, name="integer, whole tiles, dense", K=128, N=256, tokens=80, top_k=5, dense=True, dtype=_FP16),
)
"""Sizes that are multiples of every tile, with what else a layer is given."""
_LAYER = replace(
    _SIZES,
    experts=32,
    K=576,
    N=544,
    tokens=80,
    top_k=4,
    own_dtypes=(_FP32, _FP32, _BF16, _FP32),
    call=Call(needs=("dX", "dA", "dB", "dgates")),
)
_IN_MODELS = (
    replace(_LAYER, name="integer, gate_up", grouped_out=True),
    replace(_LAYER, name="integer, down", grouped_in=True, gate_slots=4, routing="far_sentinels"),
    replace(
        _LAYER,
        name="integer, one token, fused",
        tokens=1,
        top_k=8,
        gate_slots=8,
        own_dtypes=(),
        use_fused_dX=True,
        use_fused_gather=True,
    ),
    replace(_LAYER, name="integer, many rows, fp16", experts=40, tokens=600, dtype=_FP16, own_dtypes=(), rank=72),
)
"""Many experts with long sums, their biases frozen, as in the models that are trained."""
_EQUAL = replace(_SIZES, name="integer, equal counts", tokens=24, routing="equal")
_EXPERTS = replace(_SIZES, K=32, N=32, tokens=250, top_k=8, grouped_in=True, grouped_out=True, rank=3)


def ordinary(dtype: torch.dtype) -> list[Case]:
    """Ordinary numbers: every routing, tail, option and kind of data once."""
    odd = Case("odd sizes", 4, 96, 160, 37, 2, 16, dtype)  # K, N and M are multiples of no tile
    small = Case("small", 4, 64, 96, 24, 2, 16, dtype)
    edge = like(small, "boundary scales", K=192, data="boundary", bias=True)
    return [
        Case("block gate_up", 8, 512, 512, 16, 2, 16, dtype, grouped_out=True),
        Case("block down", 8, 256, 512, 16, 2, 16, dtype, grouped_in=True, gate_slots=2),
        Case("balanced", 2, 256, 256, 24, 2, 16, dtype, data="balanced"),
        odd,
        like(odd, "odd sizes, fused dX", use_fused_dX=True, bias=True),
        like(odd, "odd sizes, fused gather", use_fused_gather=True),
        like(odd, "odd sizes, fused", **FUSED, grouped_out=True),
        like(small, "empty experts", experts=6, routing="empty_experts"),
        like(small, "one expert", tokens=40, top_k=1, routing="one_expert", bias=True),
        like(small, "sentinels", routing="sentinels", bias=True),
        like(small, "sentinels, fused", routing="sentinels", **FUSED),
        like(small, "sentinels, gates", routing="sentinels", bias=True, gate_slots=2),
        like(small, "sentinels, grouped in", routing="sentinels", grouped_in=True, grouped_out=True),
        edge,
        like(edge, "boundary scales, fused", **FUSED),
        like(small, "wide scales", K=128, data="wide", bias=True, gate_slots=2),
        like(small, "k 1", tokens=33, top_k=1, grouped_out=True),
        like(small, "k 8", experts=12, tokens=6, top_k=8),
        like(small, "k 1, gates of 4 slots", tokens=12, top_k=4, fan_out=1, gate_slots=4, bias=True),
        like(small, "grouped in, by position", grouped_in=True, bias=True),
        like(small, "grouped in, fused", grouped_in=True, gate_slots=2, **FUSED),
        *(like(small, f"rank {r}", rank=r, data="balanced") for r in (1, 3, 20, 128)),
        like(small, "no LoRA", rank=0, bias=True, gate_slots=2),
        like(small, "scaling one third", scaling=1 / 3, data="balanced"),
        *crossings("", replace(LONG, dtype=dtype)),
        *ends(dtype),
        like(small, "one token", tokens=1),
        like(small, "no tokens", tokens=0, bias=True),
    ]


def ends(dtype: torch.dtype) -> list[Case]:
    """Numbers at both ends of a dtype's range, where every operand is there and every gradient is asked for."""
    base = Case("", 4, 64, 96, 24, 2, 16, dtype, bias=True, gate_slots=2)
    large = like(base, "results beyond fp16", data="large", gate_slots=0)
    return [
        like(base, "subnormal", data="subnormal"),
        like(base, "subnormal dOut", data="tiny dOut"),
        like(base, "infinity in dOut", special="inf dOut"),
        *([large, like(large, "results beyond fp16, gates", gate_slots=2)] if dtype == torch.float16 else []),
    ]


def integers(dtype: torch.dtype) -> list[Case]:
    """Fixtures that are exact in any order of summation: every option, every routing."""
    base = Case("integer", 4, 64, 96, 20, 2, 4, dtype, data="integer", scaling=0.5, bias=True)
    full = Case(
        "integer, a GPU full of columns", 2, 32, FULL_OF_COLUMNS, 6, 2, 0, dtype, data="integer", routing="sentinels"
    )
    few = ROWS_ABOUT_TILES[:11]
    return [
        base,
        like(base, "integer, gates", gate_slots=2, scaling=2.0),
        like(base, "integer, fused dX", use_fused_dX=True, scaling=1.0, routing="sentinels"),
        like(base, "integer, fused gather", use_fused_gather=True, scaling=0.25, grouped_out=True),
        like(base, "integer, fused", **FUSED, rank=3, K=96, N=160),
        like(base, "integer, grouped in", grouped_in=True, gate_slots=2, routing="sentinels"),
        like(base, "integer, grouped through", grouped_in=True, grouped_out=True, use_fused_gather=True),
        like(base, "integer, k 8", experts=10, top_k=8, tokens=5, bias=False),
        like(base, "integer, empty experts", experts=7, routing="empty_experts", rank=16),
        like(base, "integer, one expert", top_k=1, tokens=33, routing="one_expert", rank=20),
        like(base, "integer, no LoRA", rank=0, gate_slots=2),
        like(base, "integer, 1032 columns", K=32, N=1032, tokens=9, use_fused_dX=True),
        *crossings("integer, ", replace(LONG, dtype=dtype, data="integer")),
        like(base, "integer, hundreds of experts", experts=260, K=32, N=32, tokens=40, top_k=1, rank=128),
        *([] if dtype == torch.float32 else [full]),  # interpreted, programs run one after another
        like(ABOUT_TILES, "integer, few experts of about a tile", experts=11, tokens=sum(few), dtype=dtype),
    ]


def crossings(prefix: str, base: Case) -> list[Case]:
    """One size at a time past the tiles and the byte that an implementation may have in mind, all others tiny.

    And, but for the interpreter, whose tiles are never tall, tall tiles of two sizes along more steps than a ring of
    copies holds.
    """
    tall = {"experts": 3, "K": 544, "N": 544, "grouped_in": True, "grouped_out": True}
    heights = () if base.dtype == torch.float32 else (300, 520)
    return [
        like(base, f"{prefix}hundreds of rows an expert", experts=3, tokens=291, routing="one_expert"),
        like(base, f"{prefix}long K", K=1312, use_fused_dX=True),
        like(base, f"{prefix}long N", N=1312, use_fused_dX=True),
        *(like(base, f"{prefix}tall tiles in expert order, {M} rows", **tall, tokens=M) for M in heights),
    ]


def like(case: Case, name: str, **changes: Any) -> Case:
    """The case with another name, and the changes."""
    return replace(case, name=name, **changes)


def exact_sizes(scope: Scope) -> list[Case]:
    """Integer fixtures, most with results that 16 bits round; none for interpreted kernels, whose tiles are others'."""
    if scope.suite == "small" or scope.expense == "interpreted":
        return []
    return [
        rounded(_sized("K 576, N 192, rank 24, many rows", experts=2, K=576, N=192, tokens=150, rank=24)),
        rounded(_sized("K 704, N 320, rank 96", K=704, N=320, rank=96, dtype=_FP16, gate_slots=2)),
        rounded(
            _sized("K 1024, N 1152, few rows", K=1024, N=1152, tokens=9, top_k=1, gate_slots=1, adapter_dtype=_FP32)
        ),
        rounded(_sized("dense, K 100, N 40", dense=True, K=100, N=40)),
        rounded(_sized("K 1024, N 520, beyond TF32", K=1024, N=520, dtype=_FP32, gate_slots=2)),
        rounded(_sized("K 576, N 1088, beyond TF32", K=576, N=1088, dtype=_FP32)),
        rounded(_sized("full tiles before sentinels", experts=2, tokens=192, routing="whole_tiles")),
        _sized("full tiles before sentinels, gates", experts=2, tokens=148, routing="whole_tiles", gate_slots=2),
        replace(_EXPERTS, name="integer, 128 experts", experts=128),
        replace(_EXPERTS, name="integer, 384 experts", experts=384, dtype=_FP16),
        replace(_EXPERTS, name="integer, 512 experts", experts=512),
        replace(_EXPERTS, name="integer, 160 experts", experts=160, gate_slots=8, grouped_in=False, grouped_out=False),
        _sized("one row", tokens=1, top_k=1),
        _sized("one row of one expert", experts=1, tokens=1, top_k=1),
        _sized("NaN behind an expert's ranks", adapter_values="nan A", rank=20),
        replace(_EQUAL, dense=True),
        replace(_EQUAL, name="integer, equal counts in expert order", experts=3, grouped_in=True, dtype=_FP16),
        replace(ABOUT_TILES, name="integer, about a tile", K=96, N=100, rank=20, gate_slots=1, dtype=_BF16),
        replace(ABOUT_TILES, name="integer, about a tile, dense", K=160, N=161, rank=16, dense=True, dtype=_FP16),
        _sized("zero gates", gate_slots=2, gate_values="zero"),
        rounded(_sized("a batch's gates for one token", tokens=40, gate_slots=80)),
        _sized("s·Z beyond fp16", dtype=_FP16, adapter_values="s·Z overflows", scaling=2.0, rank=4, bias=False),
        _SIDE_BY_SIDE,
        rounded(_SIDE_BY_SIDE),
        *(rounded(case) for case in (*_LONG_SUMS, *_AS_TRAINED)),
        *_IN_MODELS,
        _sized("2048 rows an expert", experts=2, K=32, N=32, tokens=2048, rank=2, routing="equal"),
        _sized("4096 rows of one expert", experts=1, K=32, N=32, tokens=4096, top_k=1, rank=2, dtype=_FP16),
        _sized("a row beyond 2048", experts=3, K=32, N=32, tokens=2049, top_k=1, rank=2),
        _sized("thousands of rows", experts=5, K=32, N=32, tokens=4500, rank=2),
        _sized("thousands of rows, gates", experts=5, K=32, N=32, tokens=9000, rank=2, gate_slots=2, dtype=_FP16),
    ]


def _sized(name: str, **changes: Any) -> Case:
    return like(_SIZES, f"integer, {name}", **changes)
