"""The list of checks: complete, without doubles, and proof against whatever a candidate does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import mxref
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.shipped import golden
from mxref.verification.cases.scope import Scope, Suite
from mxref.verification.checks.check import Asked, Check
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.checks.registry import BASELINE, CHECKS, STATE, why
from mxref.verification.gate.plan import Item, plan
from mxref.verification.gate.run import judge

CPU = torch.device("cpu")
HERE = [check for check in CHECKS if check.asked is not Asked.OWN_ON_GPU]
FOREIGN = [check for check in CHECKS if check.asked is Asked.ANY]


def test_every_check_has_a_name_and_a_reason_of_its_own() -> None:
    every = (*CHECKS, STATE, BASELINE)
    assert len({check.name for check in every}) == len(every)
    assert len({check.why for check in every}) == len(every)
    for check in every:
        assert check.why.endswith("."), check.name
    assert list(why()) == [check.name for check in every]


def test_checks_that_share_a_run_stand_together() -> None:
    """`plan` shares a run among neighbours only."""
    keys = [(check.ask, check.cases) for check in CHECKS]
    assert len(list(groupby(keys))) == len(set(keys))


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", ["small", "quick", "full"])
def test_cases_of_a_check_have_names_of_their_own(suite: Suite, device_type: str) -> None:
    for check in CHECKS:
        names = [case.name for case in check.cases(Scope(suite, device_type))]
        assert len(set(names)) == len(names), check.name


def first_item(check: Check) -> Item:
    """The smallest case that it is asked about."""
    return (
        plan(Scope("small", "cpu"), own=True, checks=[check]) or plan(Scope("quick", "cpu"), own=True, checks=[check])
    )[0]


def ill(do: Callable[..., Any]) -> Candidate:
    """A candidate whose every part does the same: layer, decoder, operators and tables."""
    schedule = SimpleNamespace(Routing=lambda *operands: SimpleNamespace(tiles=do, inverse=do))
    operators: Any = SimpleNamespace(
        layer=SimpleNamespace(activation=SimpleNamespace(gated=do)),
        scatter2scatter_lora_mx=do, scatter2scatter_lora_dX_mx=do, dequantize_experts=do,
        selective_lora_weights=lambda *operands: (do(), do()), device=SimpleNamespace(schedule=schedule),
    )  # fmt: skip
    return Candidate("ill", do, decode=do, configs=lambda dtype: ["only"], operators=operators)


def layer(config: object = None, use_fused_dX: bool = False, use_fused_gather: bool = False, **operands: Any) -> Tensor:
    return mxref.parallel_linear_lora(**operands)


def changed(change: Callable[[Tensor], object]) -> Callable[..., Any]:
    """The right result, if it is the layer that is called, and then something else."""
    return lambda *args, **operands: change(layer(**operands) if operands else torch.ones(3, 5))


def noise(y: Tensor) -> Tensor:
    return (y.detach() + torch.rand(y.shape)).to(torch.complex128)


def raises(error: BaseException) -> Callable[..., Any]:
    def call(*args: Any, **operands: Any) -> Any:
        raise error

    return call


RAISING: dict[str, Callable[..., Any]] = {
    "raises": raises(RuntimeError("boom")),
    "an error without words": raises(AssertionError()),
    "ends its process": raises(SystemExit(0)),
}
ILL = RAISING | {
    "nothing": changed(lambda y: None),
    "several": changed(lambda y: (y, y)),
    "a row too many": changed(lambda y: torch.cat((y, y[:1])) if len(y) else y.new_zeros(1, *y.shape[1:])),
    "no dimension": changed(lambda y: y.sum()),
    "turned": changed(lambda y: y.T),
    "another dtype": changed(lambda y: y.to(torch.float16)),
    "integers": changed(lambda y: y.detach().nan_to_num().to(torch.int64)),
    "complex noise": changed(noise),
    "8 bits": changed(lambda y: y.detach().to(torch.float8_e4m3fn)),
    "NaN": changed(lambda y: y * torch.nan),
    "no numbers": changed(lambda y: torch.empty_like(y, device="meta")),
    "sparse": changed(lambda y: y.detach().to_sparse()),
}


@pytest.mark.parametrize("kind", ILL)
@pytest.mark.parametrize("check", HERE, ids=lambda check: check.name)
def test_no_check_raises_for_what_a_candidate_does(check: Check, kind: str) -> None:
    """It is a finding; and where nothing was there to judge, nothing passes."""
    findings = judge(first_item(check), ill(ILL[kind]), ACCUMULATIONS["fp32-blocks-64"])
    assert all(isinstance(finding, Finding) and finding.reason for finding in findings)
    own = {check.name, STATE.name} if kind == "complex noise" else {check.name}  # it draws random numbers
    assert {finding.check for finding in findings} <= own
    if kind in RAISING:
        assert Status.PASS not in {finding.status for finding in findings}


@pytest.mark.parametrize("check", FOREIGN, ids=lambda check: check.name)
def test_configurations_that_cannot_be_listed_are_a_finding(check: Check) -> None:
    candidate = replace(golden(), call=layer, configs=raises(RuntimeError("no list")))
    findings = judge(first_item(check), candidate, ACCUMULATIONS["fp32-blocks-64"])
    assert all(finding.status is Status.PASS for finding in findings) == (check.name not in ("rows", "configurations"))


def test_the_smallest_cases_are_all_passed_by_the_golden_model() -> None:
    """What any candidate is asked; this project's own kernels are judged by the gate itself."""
    for item in plan(Scope("small", "cpu"), own=False):
        wrong = [str(f) for f in judge(item, golden(), ACCUMULATIONS["fp32-blocks-64"]) if f.status is not Status.PASS]
        assert wrong == [], item.name
