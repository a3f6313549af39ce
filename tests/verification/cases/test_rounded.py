"""Sums that are exact in any order, results that are not representable: honest arithmetic has the reference's bits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from mxref.scattermoe import RoundingPoints
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS, declared_points
from mxref.verification.candidates.answer import Answer
from mxref.verification.cases.call import Call
from mxref.verification.cases.case import Case, Sample
from mxref.verification.cases.draw import draw
from mxref.verification.cases.integer import rounding_points
from mxref.verification.cases.rounded import rounded
from mxref.verification.cases.scope import Scope
from mxref.verification.cases.suites import exact_cases
from mxref.verification.checks.expectation import Expectation
from mxref.verification.checks.values import equal
from mxref.verification.gate.problem import problem_of, problem_text
from mxref.verification.studies.honest.emulation import Dot, Emulated, blocks, fused_chain, tensor_core

BF16, FP16 = torch.bfloat16, torch.float16
PLAIN = Case("plain", 3, 64, 48, 9, 2, 4, BF16, data="integer", scaling=0.5, bias=True)
CASES = {
    "gates": replace(PLAIN, gate_slots=2),
    "one gate a token": replace(PLAIN, gate_slots=1, top_k=1),
    "fp16": replace(PLAIN, dtype=FP16, gate_slots=2),
    "two tokens, twenty rows": replace(PLAIN, experts=12, tokens=2, top_k=10, gate_slots=4),
    "by expert": replace(PLAIN, grouped_in=True, grouped_out=True, rank=3),
    "sentinels": replace(PLAIN, routing="sentinels", top_k=4, parameter_dtype=torch.float32),
}
POINTS = ("z", "y", "out", "dy", "v", "d", "dx", "dA", "dB", "dbias", "dgates")
DOTS = {
    "blocks": blocks(16), "shuffled": blocks(8, "shuffled", "by size"), "backward": fused_chain("backward"),
    "tensor core": tensor_core(16),
}  # fmt: skip


@cache
def drawn(name: str, seed: int = 0) -> Sample:
    return draw(rounded(CASES[name]), seed=seed)


def failures(outputs: dict[str, Tensor], sample: Sample, *points: str) -> set[str]:
    expected = Expectation(sample, declared_points(points, sample.case.dtype), ACCUMULATIONS["undeclared"], 1)
    return {finding.tensor for finding in equal([Answer(outputs)], expected) if not finding.ok}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dot", DOTS.values(), ids=DOTS)
def test_every_honest_order_has_the_same_bits(name: str, dot: Dot) -> None:
    sample = drawn(name)
    outputs = Emulated(dot, sample.case.dtype, RoundingPoints.contract(sample.case.dtype)).run(sample)
    assert failures(outputs, sample) == set()


@pytest.mark.parametrize("point", ["z-unrounded", "lora-after-output", "gates-before-output"])
def test_a_point_that_is_declared_is_right_and_one_that_is_not_shows(point: str) -> None:
    sample = drawn("gates")
    outputs = Emulated(blocks(16), BF16, declared_points((point,), BF16)).run(sample)
    assert failures(outputs, sample, point) == set()
    assert "Y" in failures(outputs, sample)


@pytest.mark.parametrize(("tensor", "point"), [("Y", "out"), ("dX", "dx"), ("dA", "dA"), ("dB", "dB")])
def test_a_tie_that_is_rounded_away_from_zero_shows(tensor: str, point: str) -> None:
    sample, contract = drawn("gates"), RoundingPoints.contract(BF16)
    outputs = Emulated(blocks(16), BF16, contract).run(sample)
    exact = rounding_points(sample.problem, sample.grad_out, contract)[point].exact
    ulp = torch.exp2(torch.frexp(exact)[1].double() - 8)
    away = torch.sign(exact) * torch.floor(exact.abs() / ulp + 0.5) * ulp
    assert failures(outputs | {tensor: away}, sample) == {tensor}


def test_every_rounding_point_of_the_contract_is_asked_for_bit_by_bit() -> None:
    scope = Scope("quick", "cpu", interpreted=False)
    cases = [case for case in exact_cases(scope) if case.data == "rounded" and case.dtype != torch.float32]
    assert {case.dtype for case in cases} == {BF16, FP16}
    rounds = Counter[str]()
    for case in cases[:60]:
        sample = draw(case)
        points = rounding_points(sample.problem, sample.grad_out, RoundingPoints.contract(case.dtype))
        rounds.update(name for name, point in points.items() if bool((point.exact != point.value).any()))
    assert min(rounds[name] for name in ("z", "y", "out", "dy", "v", "d", "dx", "dA", "dB", "dbias", "dgates")) >= 3, (
        rounds
    )


@pytest.mark.parametrize("suite", ["small", "quick", "full"])
def test_an_interpreter_that_does_not_round_is_not_asked(suite: str) -> None:
    cases = exact_cases(Scope(suite, "cpu", interpreted=True))  # type: ignore[arg-type]
    assert not [case for case in cases if case.data == "rounded"]


@pytest.mark.parametrize("interpreted", [False, True])
def test_parameters_may_differ_in_dtype(interpreted: bool) -> None:
    """A gradient has its own parameter's dtype and nobody else's rounding."""
    scope = Scope("quick", "cpu", interpreted=interpreted)
    mixed = [
        case
        for case in exact_cases(scope)
        if case.own_dtypes and case.rank and case.bias and case.gate_slots and case.name.startswith("integer")
    ]
    assert {case.dtype for case in mixed} == set(scope.dtypes)
    for case in mixed:
        sample = draw(case)
        found = {name: getattr(sample.problem, name).dtype for name in case.dtypes}
        assert found == case.dtypes
        assert len(set(found.values())) > 1
        assert "A, B, biases and gates in" in problem_text(problem_of(case, 0))


def test_nothing_keeps_a_wrong_result_from_being_seen() -> None:
    """No class that leaves nothing to see takes part, and every other one does."""
    scope = Scope("quick", "cpu", interpreted=False)
    cases = [case for case in exact_cases(scope) if case.data == "rounded" and case.name.startswith("pairs")]
    for case in cases:
        assert case.tokens == 1 or case.tokens >= 5
        assert case.routing != "all_sentinels"
        assert case.scaling
        assert all(case.call.wants(name) for name in ("dX", "dA", "dB", "dbias", "dgates"))
    assert any(case.tokens == 1 and case.rank for case in cases)
    assert {case.position_order for case in cases} == {"ascending", "descending", "shuffled"}
    routings = {(case.routing, case.grouped_in) for case in cases}
    assert {("duplicates", False), ("sentinels", False)} <= routings
    assert {case.call.weights for case in cases if case.dense} >= {"sliced", "padded", "transposed"}
    scattered = [case.call for case in cases if not case.grouped_in and case.k > 1]
    assert {call.algorithms for call in scattered} >= {"deterministic", "strictly deterministic"}
    assert {call.autocast for call in scattered} >= {"forward pass", "both passes"}


@pytest.mark.parametrize(("name", "own"), [("gates", False), ("one gate a token", True), ("by expert", True)])
@pytest.mark.parametrize("data", ["integer", "rounded"])
def test_scale_bytes_differ_from_block_to_block_and_from_expert_to_expert(name: str, own: bool, data: str) -> None:
    """Where a row of the output, or of x, is one expert's; what several experts add up to has one scale."""
    case = replace(CASES[name], experts=5)
    sample = draw(case if data == "integer" else rounded(case))
    scales = sample.problem.expert_weights.scales.int()
    assert scales[0].unique().numel() > 3
    between = (scales - scales[:1])[:, 0, 0]
    assert torch.equal(scales - scales[:1], between[:, None, None].expand_as(scales))
    assert (between.unique().numel() > 2) == own


def test_experts_share_a_scale_where_their_biases_or_weights_are_one_in_memory() -> None:
    case = replace(CASES["by expert"], call=Call(biases="expanded"))
    scales = draw(case).problem.expert_weights.scales
    assert torch.equal(scales, scales[:1].expand_as(scales))
