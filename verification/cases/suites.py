"""What an implementation is asked, by suite: cases that have names, and those that cover the domain.

    small   seconds: what a mutant is judged by (see `own.small`)
    quick   what a commit is judged by: minutes interpreted on a CPU, seconds on a GPU
    full    what a release is judged by: the quick suite, longer sums, and on a GPU the shapes of real models

On a CPU, kernels run interpreted in fp32 without rounding points, so cases there have fp32 activations whose *values*
lie on the bf16 grid; rounding to 16 bits is judged on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

import torch

from mxref.fragments import TILE
from mxref.verification.cases import named
from mxref.verification.cases.case import Case
from mxref.verification.cases.domain_cases import EXACT_SLOTS, domain_cases
from mxref.verification.cases.elements import element_cases, element_cases_with_options, every_element
from mxref.verification.cases.named import ABOUT_TILES, FUSED, exact_sizes, like
from mxref.verification.cases.rounded import rounded
from mxref.verification.cases.scope import Scope, Suite
from mxref.verification.clone import of_a_clone
from mxref.weights import MXLayout

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_ROWS = Case("integer, more than 2^16 rows", 5, 32, 32, 35_000, 2, 2, _FP32, data="integer", scaling=0.5, bias=True)
_GATES = Case("integer, bf16 gates beyond fp16", 4, 64, 96, 20, 2, 4, _BF16, data="integer", scaling=0.5, gate_slots=2)
_LONG_K = Case("integer, K beyond 8192", 1, 14_432, 32, 6, 2, 128, _BF16, data="integer", scaling=0.5)
_LONG_N = Case("integer, N beyond 5760", 2, 32, 28_737, 6, 2, 16, _FP16, data="integer", scaling=0.5, gate_slots=2,
               routing="sentinels")  # fmt: skip
_BEYOND_STAND_INS = (
    replace(_ROWS, name="integer, more than 2^16 rows of one expert", routing="one_expert", dtype=_FP16),
    replace(_ROWS, name="integer, more than 2^16 rows, gates", tokens=24_000, top_k=3, gate_slots=3, dtype=_BF16,
            routing="sentinels"),
    replace(_ROWS, name="integer, more than 2^16 rows in expert order", grouped_in=True, grouped_out=True, dense=True,
            dtype=_BF16, use_fused_dX=True, use_fused_gather=True),
    replace(_GATES, gate_exponent=20),
    _LONG_K,
    replace(_LONG_K, name="integer, K beyond 8192, dense", dense=True, grouped_in=True, rank=3),
    _LONG_N,
    replace(_LONG_N, name="integer, N beyond 5760, dense", dense=True, grouped_out=True, gate_slots=0, rank=3),
    Case("integer, more than 512 experts", 520, 32, 32, 40, 2, 128, _BF16, data="integer", scaling=0.5, bias=True),
    Case("integer, 32 experts and columns", 32, 64, 32, 20, 2, 4, _FP32, data="integer", scaling=0.5, bias=True),
    Case("integer, 40 slots", 4, 64, 96, 3, 40, 4, _FP32, data="integer", scaling=0.5, bias=True),
    Case("integer, 256 experts", 256, 32, 32, 40, 2, 3, _BF16, data="integer", scaling=0.5, bias=True,
         routing="sentinels"),
)  # fmt: skip
"""Beyond the domain's classes and stand-ins, one at a time: indices in 16 bits and counts in a byte wrap around, and
loops over columns end."""
_BEYOND_FP16 = Case(
    "integer, results beyond fp16", 4, 64, 96, 20, 2, 0, _FP16, data="integer", gate_slots=2, gate_exponent=13
)
"""Some results round to infinity, which nothing may saturate."""
_MOST_ROWS = 2**13
"""Of a case whose numbers are drawn by trial."""
_TAGS = {_BF16: "bf16", _FP16: "fp16", _FP32: "fp32"}


def _small(name: str, *where: str) -> list[Case]:
    """Cases of the small suite, of a device type."""
    cases: list[Case] = getattr(of_a_clone("cases.own.small", "the small suite"), name)(*where)
    return cases


def decode_cases(scope: Scope) -> list[Case]:
    """Every code with every scale byte, in each activation dtype that is judged."""
    if scope.suite == "small":
        return _small("decode_cases", scope.device_type)
    return [case for dtype in scope.dtypes for case in (*element_cases(dtype), *element_cases_with_options(dtype))]


def decoder_cases(suite: Suite, device_type: str) -> list[Case]:
    """Weights for a candidate's own decoder: every code, byte and place; sizes that are multiples of no tile."""
    every = [every_element(dtype) for dtype in (_FP32, _BF16, _FP16)]
    return [*every, *(_small("decoder_cases") if suite == "small" else [])]


def integer_cases(suite: Suite, device_type: str) -> list[Case]:
    """Fixtures that are exact in any order of summation: every option, every routing, scale bytes over 2^±120."""
    if suite == "small":
        return _small("integer_cases", device_type)
    if device_type == "cpu":
        return named.integers(_FP32)
    return [like(case, f"{case.name}, {tag}") for dtype, tag in ((_BF16, "bf16"), (_FP16, "fp16"))
            for case in named.integers(dtype)]  # fmt: skip


def in_fragments(cases: Iterable[Case]) -> list[Case]:
    """The cases whose packed weights can have the layout FRAGMENTS, so that they have it."""
    return [
        replace(case, name=f"{case.name}, in fragments", layout=MXLayout.FRAGMENTS, covers=())
        for case in cases
        if not case.dense and case.N % TILE == 0
    ]


def exact_cases(scope: Scope) -> list[Case]:
    """Fixtures that are exact in any order of summation: those that cover the domain, and what lies beyond it."""
    fixtures = integer_cases(scope.suite, scope.device_type)
    if scope.suite == "quick" and scope.device_type == "cpu":
        fixtures = some(fixtures)
    large = () if scope.suite == "small" or scope.expense == "interpreted" else _BEYOND_STAND_INS
    beyond = [_BEYOND_FP16, ABOUT_TILES] if scope.suite != "small" and _FP16 in scope.dtypes else []
    mixed = _mixed(scope) if scope.suite != "small" else []
    return [*fixtures, *large, *beyond, *mixed, *exact_sizes(scope), *exact_domain(scope), *_rounded_domain(scope)]


def exact_domain(scope: Scope) -> list[Case]:
    """The domain's cases whose sums are exact."""
    return [case for case in _domain(scope) if case.exact]


def _mixed(scope: Scope) -> list[Case]:
    """Parameters of different dtypes, each of which its gradient has; infinite ones, or x; lora_A, or s, zero."""
    base = Case("integer, A zero", 4, 64, 96, 20, 2, 4, data="integer", scaling=0.5, bias=True, gate_slots=2)
    cases = [replace(base, adapter_values="zero A"), replace(base, name="integer, s zero", scaling=0.0)]
    cases.append(replace(base, name="integer, infinity in x, no LoRA", special="inf row", rank=0, gate_slots=0))
    for dtype in scope.dtypes:
        for values in ("nan A", "nan B"):
            far = replace(base, name=f"integer, {values}, infinities, {_TAGS[dtype]}", dtype=dtype, nan_bias=True)
            cases.append(replace(far, adapter_values=values, gate_values="one NaN"))
            if dtype == _FP16:
                cases.append(replace(cases[-1], name=f"{cases[-1].name}, from fp32", parameter_dtype=_FP32))
        for own in ((_FP32, _BF16, _FP16, _FP32), (_BF16, _FP32, _FP32, _FP16), (_BF16, _FP16, _FP16, _BF16)):
            name = f"integer, {_TAGS[dtype]}, A {_TAGS[own[0]]}, B {_TAGS[own[1]]}"
            cases.append(replace(base, name=name, dtype=dtype, own_dtypes=own))
        other = _BF16 if dtype == _FP32 else _FP32
        alone = replace(base, name=f"integer, {_TAGS[dtype]}, no LoRA, biases {_TAGS[other]}", dtype=dtype, rank=0)
        cases.append(replace(alone, own_dtypes=(dtype, dtype, other, dtype)))
    return [*cases, *(rounded(case) for case in cases if case.own_dtypes and case.dtype != _FP32)]


def _rounded_domain(scope: Scope) -> list[Case]:
    """Cases of every pair of classes in 16 bits once more, with exact sums to be rounded and nothing in the way."""
    if scope.suite == "small":
        return []
    pairs = _domain(replace(scope, suite="quick"))
    few = (case for case in pairs if case.rows <= _MOST_ROWS and case.gate_slots <= EXACT_SLOTS)
    return [rounded(case) for case in few if case.dtype != _FP32]


def some(cases: Iterable[Case]) -> list[Case]:
    """A few of the named integer fixtures, which the interpreter has time for."""
    kept = ("hundreds", "long", "1032", "no LoRA", "k 8", "gates", "about")
    return [case for case in cases if any(word in case.name for word in kept)]


def ordinary_cases(scope: Scope) -> list[Case]:
    """Ordinary numbers: named cases, and those that cover the domain where no exact fixture exists."""
    drawn = drawn_cases(scope.suite, scope.device_type)
    return [*drawn, *_rounded(scope), *_long(scope), *(case for case in _domain(scope) if not case.exact)]


def _long(scope: Scope) -> list[Case]:
    """Sums beyond those of `_BEYOND_STAND_INS`, with a term in every place: an exact one has few, the last seldom."""
    if scope.suite == "small" or scope.expense == "interpreted":
        return []
    return [
        Case("K beyond 8192", 1, 8224, 32, 6, 2, 3, _BF16, data="balanced"),
        Case("N beyond 5760", 2, 32, 6113, 6, 2, 3, _FP16, data="balanced"),
        Case("thousands of rows, off every grid", 5, 32, 32, 4500, 2, 2, _FP32, data="off_grid"),
    ]


def _rounded(scope: Scope) -> list[Case]:
    """The named cases in bf16, and long sums in fp16, for plain PyTorch on a CPU: interpreted kernels do not round."""
    if scope.suite == "small" or scope.device_type != "cpu" or scope.interpreted:
        return []
    cases = [*named.ordinary(_BF16), *named.crossings("", replace(named.LONG, dtype=_FP16)), *named.ends(_FP16)]
    return [like(case, f"{case.name}, {_TAGS[case.dtype]}") for case in cases if "tall" not in case.name]


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
        return _small("drawn_cases", device_type)
    return _quick(device_type) if suite == "quick" else _full(device_type)


def behaviour_cases(suite: Suite, device_type: str) -> list[Case]:
    """What a candidate is compared with itself on: every path once, tiny in the interpreter, many tiles on a GPU."""
    if suite == "small":
        return _small("behaviour_cases", device_type)
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
        return named.ordinary(_FP32)
    both = {"odd sizes", "balanced", "boundary scales", "wide scales", "block down"}
    master = Case("fp32 parameters", 4, 256, 320, 65, 2, 16, _BF16, _FP32, bias=True, gate_slots=2)
    return [
        *(like(case, f"{case.name}, bf16") for case in named.ordinary(_BF16)),
        *(like(case, f"{case.name}, fp16") for case in named.ordinary(_FP16) if case.name in both),
        *(like(case, f"{case.name}, fp32") for case in named.ordinary(_FP32) if case.name in both),
        master,
        like(master, "fp32 parameters, fused", **FUSED),
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
        like(dense, "dense E128, fused", tokens=1024, **FUSED),
        sparse,
        like(sparse, "sparse E256, 10 active, fp16", dtype=_FP16, tokens=256, use_fused_dX=True),
        gpt_oss,
        Case(
            "gpt-oss down E32 K2880 N2880", 32, 2880, 2880, 256, 4, 16, _BF16, bias=True, grouped_in=True, gate_slots=4
        ),
        Case("block gate_up, 512 tokens, fp16", 8, 512, 512, 512, 2, 16, _FP16, data="balanced"),
        Case("long expert", 1, 256, 256, 5000, 1, 128, _BF16, data="balanced"),
    ]
