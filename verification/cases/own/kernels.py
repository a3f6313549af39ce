"""Cases that only this project's kernels are asked about: other layouts and dtypes, operators, indices, routing."""

from __future__ import annotations

from dataclasses import replace

import torch

from mxref.verification.cases.case import Case
from mxref.verification.cases.elements import element_cases, elements_to_128, one_hot_elements
from mxref.verification.cases.named import like
from mxref.verification.cases.own import small
from mxref.verification.cases.scope import Scope, Suite
from mxref.verification.cases.small import smallest, usual_dtype
from mxref.verification.cases.suites import decode_cases, exact_domain, in_fragments, integer_cases, some


def own_integer_cases(suite: Suite, device_type: str) -> list[Case]:
    """Weights that are decoded already, an N that no tile divides, gates beyond the range of fp16."""
    if suite == "small":
        gates = small.integer_cases(device_type)[1]
        return [
            replace(gates, name="gates, dense weights", dense=True),
            replace(gates, name="gates beyond fp16", gate_exponent=20),
        ]
    base = integer_cases("quick", device_type)[0]
    sentinels = replace(base, routing="sentinels", gate_slots=2)
    return [
        like(sentinels, "dense weights", dense=True),
        like(base, "129 columns", N=129, use_fused_dX=True),
        like(sentinels, "gates beyond fp16", gate_exponent=20),
    ]


def narrow_decode_cases(suite: Suite, device_type: str) -> list[Case]:
    """The finite bytes in 16 bits on a CPU: decoding is exact there, so the interpreter's fp32 is good enough."""
    if device_type != "cpu":
        return []
    if suite == "small":
        return [one_hot_elements(torch.bfloat16), one_hot_elements(torch.float16)]
    return [case for dtype in (torch.bfloat16, torch.float16) for case in element_cases(dtype, nonfinite=False)]


def fragment_cases(scope: Scope) -> list[Case]:
    """Exact fixtures on weights in the layout FRAGMENTS: every code and byte, every option, on a GPU the domain too."""
    dtype = usual_dtype(scope.device_type)
    if scope.suite == "small":
        return in_fragments([*small.integer_cases(scope.device_type), elements_to_128(dtype)])
    decode = [elements_to_128(dtype), *decode_cases(scope)]
    integers = integer_cases("quick", scope.device_type)
    if scope.device_type == "cpu":
        return in_fragments([*decode, *some(integers)])
    return in_fragments([*decode, *integers, *exact_domain(scope)])


def operator_case(device_type: str) -> Case:
    """For operators one by one: packed weights that are not square and LoRA, sentinels, no gates, not grouped."""
    return replace(smallest(usual_dtype(device_type)), name="operators", experts=3, K=64, N=33, routing="sentinels")


def remote_cases(device_type: str) -> list[Case]:
    """A token a row, with sentinels: NaN in what belongs to remote experts."""
    gates = small.integer_cases(device_type)[1]
    return [replace(gates, name="remote rows", top_k=1, gate_slots=1, tokens=18, special="nan remote")]


def unordered_cases(device_type: str) -> list[Case]:
    """Whose positions and offsets are put out of range: ungrouped, without gates; empty experts first and last."""
    cases = {case.name: case for case in small.integer_cases(device_type)}
    return [
        replace(cases["small"], name="positions"),
        replace(cases["fused"], name="positions, fused"),
        replace(cases["gates"], name="offsets", experts=5, routing="empty_experts"),
    ]


def index_cases(device_type: str) -> list[Case]:
    """Sizes far below a limit whose products go beyond it, see `candidates.own.interpreted`."""
    sizes = Case(
        "sizes", 48, 96, 352, 90, 2, 0, usual_dtype(device_type), routing="ten_active", bias=True,
        use_fused_dX=True, use_fused_gather=True,
    )  # fmt: skip
    return [
        sizes,
        replace(sizes, name="sizes, gates", bias=False, gate_slots=2),
        replace(sizes, name="sizes, LoRA", bias=False, K=32, N=32, tokens=260, rank=32),
        replace(sizes, name="sizes, gradients of LoRA", bias=False, tokens=45, rank=16),
    ]


def stack_cases(device_type: str) -> list[Case]:
    """A stack for the decoder alone: one expert's matrix below that limit, all their scales beyond it."""
    return [Case("a stack", 100, 64, 64, 0, 1, 0, torch.float32)]
