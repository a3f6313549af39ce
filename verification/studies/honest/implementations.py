"""False alarms: honest implementations, each under its true declaration, which no check may reject.

On a CPU the implementations are emulated, rounding to 16 bits included; on a GPU they are the shipped kernels under
every configuration that dispatch can reach. Every judgement is one implementation on one draw, by equality on
integer data, and by the checks of intervals, drift, signs and exponents on all other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from mxref.fragments import TILE
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS, Accumulation, Order, Product, declared_points
from mxref.verification.candidates.answer import Answer
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.shipped import shipped, torch_composite
from mxref.verification.cases.case import Case, Sample
from mxref.verification.cases.domain_cases import domain_cases
from mxref.verification.cases.scope import Scope
from mxref.verification.cases.suites import ordinary_cases
from mxref.verification.checks.expectation import Expectation, slopes_of
from mxref.verification.checks.finding import Finding
from mxref.verification.checks.registry import INTEGER, VALUES
from mxref.verification.studies.honest.emulation import Dot, Emulated, blocks, fused_chain, tensor_core
from mxref.weights import MXLayout, MXWeights

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_SM90, _SM80, _ANY = (ACCUMULATIONS[name] for name in ("tensor-core-sm90", "tensor-core-sm80", "undeclared"))
_EMULATED = 1 << 19
"""Products of one sum over K that an emulation takes about a second for."""
_PRODUCTS: tuple[Product, ...] = ("Z", "Y", "V", "D", "dA", "dB")


@dataclass(frozen=True)
class Honest:
    """One implementation that computes what the contract says.

    Attributes:
        name: unique, in words.
        dtype: of the activations that it is judged on.
        run: one forward and one backward pass, outputs by tensor.
        how: its accumulation, truly declared.
        points: the contract's rounding points that it has others for, truly declared.
        emulates: it computes a sample's numbers, step by step, and is not called: layouts, gradient modes and contexts
            mean nothing to it.
    """

    name: str
    dtype: torch.dtype
    run: Callable[[Sample], Mapping[str, Tensor | None]]
    how: Accumulation
    points: tuple[str, ...] = ()
    emulates: bool = False


def data_cases(dtype: torch.dtype) -> list[Case]:
    """Ten shapes and kinds of data, each with options of its own, small enough for an emulation.

    Every second one asks for the fused kernels, where there are any.
    """
    base = Case("plain", 3, 96, 80, 14, 2, 5, dtype, scaling=1 / 3, bias=True, gate_slots=2, routing="sentinels")
    square = replace(base, K=128, N=128, routing="uniform", gate_slots=0)
    cases = [
        base,
        replace(base, name="long sums", K=512, N=64, experts=2, tokens=10, data="balanced", scaling=2.0, gate_slots=0),
        replace(square, name="cancelling sums", data="cancelling", tokens=10),
        replace(square, name="all positive", K=256, data="positive", tokens=32, gate_slots=2),
        replace(base, name="LoRA above all", data="lora", rank=20, K=64),
        replace(base, name="bias above all", data="bias", routing="empty_experts", experts=5),
        replace(base, name="wide scales", K=128, data="wide", grouped_in=True, gate_slots=0),
        replace(base, name="scales at both ends", K=192, N=64, data="boundary", grouped_out=True, gate_slots=0),
        replace(base, name="many rows", experts=1, K=64, N=64, tokens=150, top_k=1, rank=3, gate_slots=0, bias=False,
                data="balanced", routing="one_expert"),
        replace(base, name="integers", data="integer", scaling=0.5, rank=4),
    ]  # fmt: skip
    fused = {case.name for case in cases[1::2]}
    return [replace(c, use_fused_dX=c.name in fused, use_fused_gather=c.name in fused) for c in cases]


def cases_of(dtype: torch.dtype, seed: int) -> list[Case]:
    """The kinds of data, and cases in which every pair of classes of the domain occurs, others for each seed."""
    return [*data_cases(dtype), *domain_cases(2, (dtype,), "cheap", seed)]


def asked(implementations: Sequence[Honest], case: Case, seed: int) -> list[Honest]:
    """Who is judged on a case: every implementation of its dtype on a kind of data; on a case of the domain one that is
    called, and one emulation, where the case is finite and small. Which ones, the case's name and the seed decide.
    """
    alike = [honest for honest in implementations if honest.dtype == case.dtype]
    if not case.covers:
        return alike
    small = not case.special and case.rows * case.K * case.N <= _EMULATED and case.experts * case.rank <= case.K
    called = [honest for honest in alike if not honest.emulates]
    emulations = [honest for honest in alike if honest.emulates and small]
    return [group[case.draw_seed(seed) % len(group)] for group in (called, emulations) if group]


def emulated() -> list[Honest]:
    """Everything honest that a CPU can emulate: tile sizes, orders, places of the LoRA product, roundings."""
    sm90, sm80 = tensor_core(16, 25), tensor_core(8, 24)
    backward, shuffled = _everywhere(Order(_reversed)), _everywhere(Order(_permuted))
    list_: list[tuple[str, torch.dtype, Dot, Accumulation, tuple[str, ...]]] = [
        ("sm_90", _BF16, sm90, _SM90, ()),
        ("sm_90, fp16", _FP16, sm90, _SM90, ()),
        ("sm_80", _BF16, sm80, _SM80, ()),
        ("sm_80, fp16", _FP16, sm80, _SM80, ()),
        ("sm_90, reversed K", _BF16, sm90, replace(_SM90, orders=backward), ()),
        ("sm_90, permuted K", _BF16, sm90, replace(_SM90, orders=shuffled), ()),
        ("sm_90, split-K 2", _BF16, sm90, replace(_SM90, orders=_everywhere(Order(parts=2))), ()),
        ("sm_90, split-K 4 of reversed K", _BF16, sm90, replace(_SM90, orders=_everywhere(Order(_reversed, 4))), ()),
        ("sm_80, split-K 3 of permuted K", _FP16, sm80, replace(_SM80, orders=_everywhere(Order(_permuted, 3))), ()),
        ("sm_90, LoRA apart", _BF16, sm90, replace(_SM90, lora="apart"), ()),
        ("sm_80, LoRA apart, bias first", _BF16, sm80, replace(_SM80, lora="apart", bias_inside=True), ()),
        ("sm_90, LoRA first, bias first", _BF16, sm90, replace(_SM90, bias_inside=True), ()),
        ("sm_90, Z unrounded", _BF16, sm90, _SM90, ("z-unrounded",)),
        ("sm_90, LoRA after the rounding", _BF16, sm90, replace(_SM90, lora="apart"), ("lora-after-output",)),
        ("sm_90, gates before the rounding", _BF16, sm90, _SM90, ("gates-before-output",)),
        ("sm_90, s in B", _BF16, sm90, _SM90, ("scaling-in-B",)),
        ("sm_90, undeclared", _BF16, sm90, _ANY, ()),
        ("sm_80, undeclared, permuted K", _FP16, sm80, replace(_ANY, orders=shuffled), ()),
        *((f"fp32 in tiles of {step}, {_short(dtype)}", dtype, blocks(step), _blocks(step), ())
          for step in (16, 64, 128) for dtype in (_BF16, _FP32)),
        ("fp32 in tiles of 32, pairwise", _BF16, blocks(32, inner="pairwise"), _blocks(32), ()),
        ("fp32 in tiles of 64, largest first", _FP32, blocks(64, inner="by size"), _blocks(64), ()),
        ("fp32 in tiles of 32, split-K 2", _FP32, blocks(32), _blocks(32, _everywhere(Order(parts=2))), ()),
        ("fp32 in tiles of 64, reversed K", _FP32, blocks(64), _blocks(64, backward), ()),
        ("fp32 in tiles of 16, permuted K", _BF16, blocks(16), _blocks(16, shuffled), ()),
        ("fused multiply-adds", _FP32, fused_chain(), _blocks(1), ()),
        ("fused multiply-adds, LoRA apart", _BF16, fused_chain(), replace(_blocks(1), lora="apart"), ()),
    ]  # fmt: skip
    composite = torch_composite()
    last = _emulated("sm_90, LoRA last, undeclared", _BF16, sm90, _ANY, ("scaling-in-B",), lora_last=True)
    return [
        *(_emulated(*each) for each in list_),
        last,
        *(Honest(f"PyTorch, {_short(dtype)}", dtype, composite.run, _ANY) for dtype in (_BF16, _FP16, _FP32)),
    ]


def on_gpu(device: torch.device) -> list[Honest]:
    """The shipped kernels, held to each configuration that dispatch can reach, in every activation dtype."""
    candidate = shipped(device)
    assert candidate.configs is not None
    assert candidate.accumulation is not None

    return [
        Honest(f"{_short(dtype)}, {config}", dtype, partial(_pinned, candidate, config), candidate.accumulation)
        for dtype in (_BF16, _FP16, _FP32)
        for config in candidate.configs(dtype)
    ]


def _pinned(candidate: Candidate, config: Any, sample: Sample) -> Mapping[str, Tensor | None]:
    """Under one configuration, on weights in the layout that it is for; where they cannot have it, under dispatch."""
    weights = sample.problem.expert_weights
    if isinstance(weights, MXWeights) and config.layout == MXLayout.FRAGMENTS:
        if weights.N % TILE:
            return candidate.run(sample)
        sample = sample.changed(expert_weights=weights.repack(MXLayout.FRAGMENTS))
    return candidate.pinned(config).run(sample)


def judge(implementations: Sequence[Honest], sample: Sample) -> Iterator[tuple[Honest, list[Finding]]]:
    """Each implementation and what every check of values says about it on one sample, which must be of its dtype.

    The reference is computed once for all that declare the same. Drift is judged at the critical z of the quick suite.
    """
    expectations: dict[tuple[tuple[str, ...], int], Expectation] = {}
    checks = (INTEGER,) if sample.case.exact else VALUES
    for honest in implementations:
        key = honest.points, id(honest.how)
        if key not in expectations:
            points = declared_points(honest.points, honest.dtype)
            expectations[key] = Expectation(sample, points, honest.how, _slopes())
        answers = [Answer(honest.run(sample))]
        yield (
            honest,
            [
                replace(finding, check=check.name)
                for check in checks
                for finding in check.compare(answers, expectations[key])
            ],
        )


@cache
def _slopes() -> int:
    return sum(slopes_of(case) for case in ordinary_cases(Scope("quick", "cpu", interpreted=False)))


def _emulated(
    name: str, dtype: torch.dtype, dot: Dot, how: Accumulation, points: tuple[str, ...], lora_last: bool = False
) -> Honest:
    narrow = None if dtype == _FP32 else dtype

    def run(sample: Sample) -> dict[str, Tensor | None]:
        emulated = Emulated(dot, narrow, declared_points(honest.points, honest.dtype), how, lora_last)
        p = sample.problem
        parameters = {"dA": p.lora_A, "dB": p.lora_B, "dbias": p.expert_biases, "dgates": p.gates}
        dtypes = {tensor: parameter.dtype for tensor, parameter in parameters.items() if parameter is not None}
        wanted = {t: x for t, x in emulated.run(sample).items() if t == "Y" or sample.case.call.wants(t)}
        return {tensor: x.to(dtypes.get(tensor, p.dtype)) for tensor, x in wanted.items()}

    honest = Honest(name, dtype, run, how, points, emulates=True)
    return honest


def _blocks(step: int, orders: Mapping[Product, Order] | None = None) -> Accumulation:
    return Accumulation("fp32_blocks", step=step, orders=orders or {})


def _everywhere(order: Order) -> dict[Product, Order]:
    return dict.fromkeys(_PRODUCTS, order)


def _reversed(n: int) -> Tensor:
    return torch.arange(n).flip(0)


def _permuted(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(n))


def _short(dtype: torch.dtype) -> str:
    return {_BF16: "bf16", _FP16: "fp16", _FP32: "fp32"}[dtype]
