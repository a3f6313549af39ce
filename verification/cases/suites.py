"""What an implementation is asked: cases as data, enumerated by hand, by suite.

    small   seconds: what a mutant is judged by (see `small`)
    quick   what a commit is judged by: minutes interpreted on a CPU, seconds on a GPU
    full    what a release is judged by: the quick suite, longer sums, and on a GPU the shapes of real models

On a CPU, kernels run interpreted in fp32 without rounding points, so cases there have fp32 activations whose *values*
lie on the bf16 grid; rounding to 16 bits is judged on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from mxref.fragments import TILE
from mxref.verification.cases import small
from mxref.verification.cases.case import Case
from mxref.verification.cases.domain_cases import domain_cases
from mxref.verification.cases.elements import element_cases, elements_to_128, every_element
from mxref.verification.cases.routing import ABOUT_TILES
from mxref.verification.cases.scope import Scope, Suite
from mxref.verification.cases.small import FULL_OF_COLUMNS
from mxref.weights import MXLayout

_FUSED = {"use_fused_dX": True, "use_fused_gather": True}
_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_ROWS = Case("integer, more than 2^16 rows", 5, 32, 32, 33_000, 2, 2, _FP32, data="integer", scaling=0.5, bias=True)
_BEYOND_STAND_INS = (
    _ROWS,
    replace(_ROWS, name="integer, more than 2^16 rows, gates", gate_slots=2, routing="sentinels"),
    Case(
        "integer, gates beyond fp16",
        4,
        64,
        96,
        20,
        2,
        4,
        _BF16,
        data="integer",
        scaling=0.5,
        gate_slots=2,
        gate_exponent=20,
    ),
    Case("integer, K beyond 5760", 2, 6144, 32, 6, 2, 3, _BF16, data="integer", scaling=0.5),
    Case("integer, N beyond 5760", 2, 32, 6113, 6, 2, 3, _FP16, data="integer", scaling=0.5),
)
"""What the domain has stand-ins for on a CPU, one at a time, small enough for plain PyTorch: 16-bit indices of rows
wrap around, and loops over columns end."""
_BEYOND_FP16 = Case(
    "integer, results beyond fp16", 4, 64, 96, 20, 2, 0, _FP16, data="integer", gate_slots=2, gate_exponent=13
)
"""Some results round to infinity, which nothing may saturate."""
_TAGS = {_BF16: "bf16", _FP16: "fp16", _FP32: "fp32"}
_ABOUT_TILES = Case(
    "integer, experts of about a tile", 17, 32, 32, sum(ABOUT_TILES), 1, 2, data="integer", scaling=0.5, bias=True,
    routing="about_tiles",
)  # fmt: skip
_LONG = Case("", 2, 32, 32, 24, 1, 4, data="balanced")
"""What one size at a time makes long, see `_crossings`."""


def decode_cases(scope: Scope) -> list[Case]:
    """Every code with every scale byte, in each activation dtype that is judged."""
    if scope.suite == "small":
        return small.decode_cases(scope.device_type)
    return [case for dtype in scope.dtypes for case in element_cases(dtype)]


def narrow_decode_cases(suite: Suite, device_type: str) -> list[Case]:
    """The finite bytes in 16 bits on a CPU: decoding is exact there, so the interpreter's fp32 is good enough."""
    if device_type != "cpu":
        return []
    if suite == "small":
        return small.narrow_decode_cases()
    return [case for dtype in (_BF16, _FP16) for case in element_cases(dtype, nonfinite=False)]


def decoder_cases(suite: Suite, device_type: str) -> list[Case]:
    """Weights for a candidate's own decoder: every code, byte and place; sizes that are multiples of no tile."""
    every = [every_element(dtype) for dtype in (_FP32, _BF16, _FP16)]
    return [*every, *(small.decoder_cases() if suite == "small" else [])]


def integer_cases(suite: Suite, device_type: str) -> list[Case]:
    """Fixtures that are exact in any order of summation: every option, every routing, scale bytes over 2^±120."""
    if suite == "small":
        return small.integer_cases(device_type)
    if device_type == "cpu":
        return _integers(_FP32)
    return [_like(case, f"{case.name}, {tag}") for dtype, tag in ((_BF16, "bf16"), (_FP16, "fp16"))
            for case in _integers(dtype)]  # fmt: skip


def own_integer_cases(suite: Suite, device_type: str) -> list[Case]:
    """Weights that are decoded already, an N that no tile divides, gates beyond the range of fp16."""
    if suite == "small":
        return small.own_integer_cases(device_type)
    base = integer_cases("quick", device_type)[0]
    sentinels = replace(base, routing="sentinels", gate_slots=2)
    return [
        _like(sentinels, "dense weights", dense=True),
        _like(base, "129 columns", N=129, use_fused_dX=True),
        _like(sentinels, "gates beyond fp16", gate_exponent=20),
    ]


def fragment_cases(scope: Scope) -> list[Case]:
    """Exact fixtures on weights in the layout FRAGMENTS: every code and byte, every option, on a GPU the domain too."""
    dtype = small.usual_dtype(scope.device_type)
    if scope.suite == "small":
        return in_fragments([*small.integer_cases(scope.device_type), elements_to_128(dtype)])
    decode = [elements_to_128(dtype), *decode_cases(scope)]
    integers = integer_cases("quick", scope.device_type)
    if scope.device_type == "cpu":
        return in_fragments([*decode, *_some(integers)])
    return in_fragments([*decode, *integers, *(case for case in _domain(scope) if case.exact)])


def in_fragments(cases: Iterable[Case]) -> list[Case]:
    """The cases whose packed weights can have the layout FRAGMENTS, so that they have it."""
    return [
        replace(case, name=f"{case.name}, in fragments", layout=MXLayout.FRAGMENTS, covers=())
        for case in cases
        if not case.dense and case.N % TILE == 0
    ]


def exact_cases(scope: Scope) -> list[Case]:
    """Fixtures that are exact in any order of summation: those that cover the domain, and what lies beyond it.

    On a GPU the named fixtures reach every tiling; interpreted there is one: the sizes beyond it, and three to ask for.
    """
    named = integer_cases(scope.suite, scope.device_type)
    if scope.suite == "quick" and scope.device_type == "cpu":
        named = _some(named)
    large = _BEYOND_STAND_INS if scope.suite == "quick" and scope.expense == "cheap" else ()
    beyond = [_BEYOND_FP16, _ABOUT_TILES] if scope.suite != "small" and _FP16 in scope.dtypes else []
    named += [*large, *beyond]
    return [*named, *(case for case in _domain(scope) if case.exact)]


def _some(cases: Iterable[Case]) -> list[Case]:
    kept = ("hundreds", "long", "1032", "no LoRA", "k 8", "gates", "about")
    return [case for case in cases if any(word in case.name for word in kept)]


def ordinary_cases(scope: Scope) -> list[Case]:
    """Ordinary numbers: named cases, and those that cover the domain where no exact fixture exists."""
    return [*drawn_cases(scope.suite, scope.device_type), *_rounded(scope), *(c for c in _domain(scope) if not c.exact)]


def _rounded(scope: Scope) -> list[Case]:
    """The named cases in bf16, and long sums in fp16, for plain PyTorch on a CPU: interpreted kernels do not round."""
    if scope.suite == "small" or scope.device_type != "cpu" or scope.interpreted:
        return []
    named = [*_grid(_BF16), *_crossings("", replace(_LONG, dtype=_FP16)), *_ends(_FP16)]
    return [_like(case, f"{case.name}, {_TAGS[case.dtype]}") for case in named if "tall" not in case.name]


@lru_cache(maxsize=4)
def _domain(scope: Scope) -> list[Case]:
    """Cases that hold every legal pair of classes of the domain, in the full suite every triple."""
    if scope.suite == "small":
        return []
    strength = 3 if scope.suite == "full" else 2
    cases = domain_cases(strength, scope.dtypes, scope.expense, scope.seed, scope.subset.within)
    return [case for case in cases if scope.subset.holds(case)]


def drawn_cases(suite: Suite, device_type: str) -> list[Case]:
    """Ordinary numbers: every routing, tail, option and kind of data."""
    if suite == "small":
        return small.drawn_cases(device_type)
    return _quick(device_type) if suite == "quick" else _full(device_type)


def behaviour_cases(suite: Suite, device_type: str) -> list[Case]:
    """What a candidate is compared with itself on: every path once, tiny in the interpreter, many tiles on a GPU."""
    if suite == "small":
        return small.behaviour_cases(device_type)
    if device_type == "cpu":
        plain = Case("plain", 3, 64, 64, 9, 2, 4)
        grouped = Case("grouped", 4, 32, 64, 12, 1, 3, routing="empty_experts", grouped_in=True, grouped_out=True)
    else:
        plain = Case("plain", 8, 512, 768, 300, 2, 16, torch.bfloat16)
        grouped = Case("grouped", 8, 768, 512, 700, 1, 16, torch.float16, routing="empty_experts")
        grouped = replace(grouped, grouped_in=True, grouped_out=True)
    everything = replace(plain, name="everything", routing="far_sentinels", bias=True, gate_slots=2)
    return [plain, replace(everything, use_fused_dX=True, use_fused_gather=True), grouped]


def configuration_cases(suite: Suite, device_type: str) -> list[Case]:
    """What each reachable configuration is judged on: integer fixtures, and one case of ordinary numbers a dtype."""
    if suite == "small":
        return []
    if device_type == "cpu":
        fixtures = [case for case in integer_cases("quick", "cpu") if case.name in ("integer, gates", "integer, fused")]
        return [*fixtures, Case("configurations", 3, 96, 160, 12, 2, 4, bias=True)]
    odd = Case("configurations", 4, 416, 352, 131, 2, 20, torch.bfloat16, bias=True, gate_slots=2, use_fused_dX=True)
    fixtures = integer_cases("quick", device_type)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    drawn = [replace(odd, name=f"configurations, {tag}", dtype=dtype) for tag, dtype in dtypes.items()]
    repacked = in_fragments(case for case in (*fixtures, *drawn) if case.dtype == torch.bfloat16)
    return [*fixtures, *drawn, *repacked]


def _quick(device_type: str) -> list[Case]:
    if device_type == "cpu":
        return _grid(_FP32)
    both = {"odd sizes", "balanced", "boundary scales", "wide scales", "block down"}
    master = Case("fp32 parameters", 4, 256, 320, 65, 2, 16, _BF16, _FP32, bias=True, gate_slots=2)
    return [
        *(_like(case, f"{case.name}, bf16") for case in _grid(_BF16)),
        *(_like(case, f"{case.name}, fp16") for case in _grid(_FP16) if case.name in both),
        *(_like(case, f"{case.name}, fp32") for case in _grid(_FP32) if case.name in both),
        master,
        _like(master, "fp32 parameters, fused", **_FUSED),
    ]


def _full(device_type: str) -> list[Case]:
    if device_type == "cpu":
        return [
            *_quick(device_type),
            Case("block gate_up, 64 tokens", 8, 512, 512, 64, 2, 16, bias=True, grouped_out=True),
            Case("longer K", 2, 2048, 64, 16, 1, 16, data="balanced"),
            Case("longer N", 2, 64, 2048, 16, 1, 16, data="balanced", use_fused_dX=True),
            Case("long expert", 1, 64, 64, 700, 1, 16, data="balanced", use_fused_gather=True),
            Case("tens of experts", 40, 64, 64, 60, 4, 8, routing="ten_active"),
            Case("odd sizes, long", 3, 416, 352, 131, 2, 20, bias=True, gate_slots=2),
        ]
    dense = Case("dense E128 K2048 N1024", 128, 2048, 1024, 4096, 8, 16, _BF16)
    sparse = Case("sparse E256, 10 active", 256, 2048, 512, 512, 8, 16, _BF16, routing="ten_active")
    gpt_oss = Case("gpt-oss gate_up E32 K2880 N5760", 32, 2880, 5760, 256, 4, 16, _BF16, bias=True, grouped_out=True)
    return [
        *_quick(device_type),
        dense,
        _like(dense, "dense E128, fused", tokens=1024, **_FUSED),
        sparse,
        _like(sparse, "sparse E256, 10 active, fp16", dtype=_FP16, tokens=256, use_fused_dX=True),
        gpt_oss,
        Case(
            "gpt-oss down E32 K2880 N2880", 32, 2880, 2880, 256, 4, 16, _BF16, bias=True, grouped_in=True, gate_slots=4
        ),
        Case("block gate_up, 512 tokens, fp16", 8, 512, 512, 512, 2, 16, _FP16, data="balanced"),
        Case("long expert", 1, 256, 256, 5000, 1, 128, _BF16, data="balanced"),
    ]


def _grid(dtype: torch.dtype) -> list[Case]:
    """Every routing, tail, option and kind of data once, small enough for the interpreter."""
    odd = Case("odd sizes", 4, 96, 160, 37, 2, 16, dtype)  # K, N and M are multiples of no tile
    small = Case("small", 4, 64, 96, 24, 2, 16, dtype)
    edge = _like(small, "boundary scales", K=192, data="boundary", bias=True)
    return [
        Case("block gate_up", 8, 512, 512, 16, 2, 16, dtype, grouped_out=True),
        Case("block down", 8, 256, 512, 16, 2, 16, dtype, grouped_in=True, gate_slots=2),
        Case("balanced", 2, 256, 256, 24, 2, 16, dtype, data="balanced"),
        odd,
        _like(odd, "odd sizes, fused dX", use_fused_dX=True, bias=True),
        _like(odd, "odd sizes, fused gather", use_fused_gather=True),
        _like(odd, "odd sizes, fused", **_FUSED, grouped_out=True),
        _like(small, "empty experts", experts=6, routing="empty_experts"),
        _like(small, "one expert", tokens=40, top_k=1, routing="one_expert", bias=True),
        _like(small, "sentinels", routing="sentinels", bias=True),
        _like(small, "sentinels, fused", routing="sentinels", **_FUSED),
        _like(small, "sentinels, gates", routing="sentinels", bias=True, gate_slots=2),
        _like(small, "sentinels, grouped in", routing="sentinels", grouped_in=True, grouped_out=True),
        edge,
        _like(edge, "boundary scales, fused", **_FUSED),
        _like(small, "wide scales", K=128, data="wide", bias=True, gate_slots=2),
        _like(small, "k 1", tokens=33, top_k=1, grouped_out=True),
        _like(small, "k 8", experts=12, tokens=6, top_k=8),
        _like(small, "k 1, gates of 4 slots", tokens=12, top_k=4, fan_out=1, gate_slots=4, bias=True),
        _like(small, "grouped in, by position", grouped_in=True, bias=True),
        _like(small, "grouped in, fused", grouped_in=True, gate_slots=2, **_FUSED),
        *(_like(small, f"rank {r}", rank=r, data="balanced") for r in (1, 3, 20, 128)),
        _like(small, "no LoRA", rank=0, bias=True, gate_slots=2),
        _like(small, "scaling one third", scaling=1 / 3, data="balanced"),
        *_crossings("", replace(_LONG, dtype=dtype)),
        *_ends(dtype),
        _like(small, "one token", tokens=1),
        _like(small, "no tokens", tokens=0, bias=True),
    ]


def _ends(dtype: torch.dtype) -> list[Case]:
    """Numbers at both ends of a dtype's range, where every operand is there and every gradient is asked for."""
    base = Case("", 4, 64, 96, 24, 2, 16, dtype, bias=True, gate_slots=2)
    large = _like(base, "results beyond fp16", data="large", gate_slots=0)
    return [
        _like(base, "subnormal", data="subnormal"),
        _like(base, "subnormal dOut", data="tiny dOut"),
        _like(base, "infinity in dOut", special="inf dOut"),
        *([large, _like(large, "results beyond fp16, gates", gate_slots=2)] if dtype == _FP16 else []),
    ]


def _integers(dtype: torch.dtype) -> list[Case]:
    base = Case("integer", 4, 64, 96, 20, 2, 4, dtype, data="integer", scaling=0.5, bias=True)
    full = Case(
        "integer, a GPU full of columns", 2, 32, FULL_OF_COLUMNS, 6, 2, 0, dtype, data="integer", routing="sentinels"
    )
    return [
        base,
        _like(base, "integer, gates", gate_slots=2, scaling=2.0),
        _like(base, "integer, fused dX", use_fused_dX=True, scaling=1.0, routing="sentinels"),
        _like(base, "integer, fused gather", use_fused_gather=True, scaling=0.25, grouped_out=True),
        _like(base, "integer, fused", **_FUSED, rank=3, K=96, N=160),
        _like(base, "integer, grouped in", grouped_in=True, gate_slots=2, routing="sentinels"),
        _like(base, "integer, grouped through", grouped_in=True, grouped_out=True, use_fused_gather=True),
        _like(base, "integer, k 8", experts=10, top_k=8, tokens=5, bias=False),
        _like(base, "integer, empty experts", experts=7, routing="empty_experts", rank=16),
        _like(base, "integer, one expert", top_k=1, tokens=33, routing="one_expert", rank=20),
        _like(base, "integer, no LoRA", rank=0, gate_slots=2),
        _like(base, "integer, 1032 columns", K=32, N=1032, tokens=9, use_fused_dX=True),
        *_crossings("integer, ", replace(_LONG, dtype=dtype, data="integer")),
        _like(base, "integer, hundreds of experts", experts=260, K=32, N=32, tokens=40, top_k=1, rank=128),
        *([] if dtype == _FP32 else [full]),  # interpreted, programs run one after another
        _like(
            _ABOUT_TILES, "integer, few experts of about a tile", experts=11, tokens=sum(ABOUT_TILES[:11]), dtype=dtype
        ),
    ]


def _crossings(prefix: str, base: Case) -> list[Case]:
    """One size at a time past the tiles and the byte that an implementation may have in mind, all others tiny.

    And, but for the interpreter, whose tiles are never tall, tall tiles of two sizes along more steps than a ring of
    copies holds.
    """
    tall = {"experts": 3, "K": 544, "N": 544, "grouped_in": True, "grouped_out": True}
    heights = () if base.dtype == _FP32 else (300, 520)
    return [
        _like(base, f"{prefix}hundreds of rows an expert", experts=3, tokens=291, routing="one_expert"),
        _like(base, f"{prefix}long K", K=1312, use_fused_dX=True),
        _like(base, f"{prefix}long N", N=1312, use_fused_dX=True),
        *(_like(base, f"{prefix}tall tiles in expert order, {M} rows", **tall, tokens=M) for M in heights),
    ]


def _like(case: Case, name: str, **changes: Any) -> Case:
    return replace(case, name=name, **changes)
