"""The gate adds findings up, gives undeclared candidates their second chance, and runs a candidate once an item."""

from __future__ import annotations

import sys
from cProfile import Profile
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import mxref
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS
from mxref.verification.arithmetic.thresholds import critical_z
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.loading import declare
from mxref.verification.candidates.shipped import golden
from mxref.verification.cases.call import Call
from mxref.verification.cases.case import Case, Sample
from mxref.verification.cases.scope import Scope
from mxref.verification.cases.subset import parse_subset
from mxref.verification.checks.expectation import Expectation
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.checks.registry import CHECKS, VALUES
from mxref.verification.gate import run as run_module
from mxref.verification.gate.plan import Item, plan, plan_cases, slopes_in
from mxref.verification.gate.problem import problem_of
from mxref.verification.gate.result import GateResult
from mxref.verification.gate.run import run_gate

CPU = torch.device("cpu")
SMALL = Case("small", 2, 64, 96, 9, 2, 4, bias=True, gate_slots=2)


def judged(candidate: Candidate, *cases: Case, strict: bool = False) -> GateResult:
    return run_gate(candidate, plan_cases(cases, CPU, 0), CPU, suite="test", seed=0, strict=strict)


def test_a_baseline_that_is_not_there_yet_is_no_failure_of_strict() -> None:
    result = result_of(Status.PASS, strict=True)
    result.findings.append(Finding("baseline", "all", "Y", Status.NOT_COVERED, "no baseline yet", 0, 0))
    assert (result.title, result.exit_code) == ("PASS", 0)
    result.findings.append(Finding("baseline", "all", "dX", Status.WORSE, "larger", 0, 0))
    assert result.exit_code == 1


def result_of(*statuses: Status, strict: bool = False) -> GateResult:
    findings = [Finding("interval", f"case {i}", "T", status, "", 1, 0) for i, status in enumerate(statuses)]
    how = ACCUMULATIONS["fp32-blocks-64"]
    return GateResult(golden(), how, "device", "suite", 0, strict, findings)


@pytest.mark.parametrize(
    ("statuses", "title", "code", "strict_code"),
    [
        ([Status.PASS, Status.PASS], "PASS", 0, 0),
        ([Status.PASS, Status.NOT_COVERED], "INCOMPLETE", 1, 1),
        ([Status.WEAK, Status.NOT_COVERED], "INCOMPLETE", 1, 1),
        ([Status.PASS, Status.WEAK], "WEAK PASS", 0, 1),
        ([Status.WEAK, Status.FAIL], "FAIL", 1, 1),
        ([Status.NOT_COVERED, Status.NOT_COVERED], "FAIL", 1, 1),
        ([], "FAIL", 1, 1),
    ],
)
def test_findings_add_up(statuses: list[Status], title: str, code: int, strict_code: int) -> None:
    assert (result_of(*statuses).title, result_of(*statuses).exit_code) == (title, code)
    assert result_of(*statuses, strict=True).exit_code == strict_code


def noisy(**operands: object) -> Tensor:
    """Outside the running bound, inside the order-free one."""
    return mxref.parallel_linear_lora(**operands) * (1 + 4e-5)  # type: ignore[arg-type]


NOISY_CASE = Case("balanced", 2, 256, 256, 24, 2, 16, data="balanced")


def test_an_undeclared_candidate_gets_a_weak_second_chance() -> None:
    result = judged(Candidate("noisy", noisy), NOISY_CASE)
    weak = [finding for finding in result.findings if finding.status is Status.WEAK]
    assert weak
    assert all("declare the accumulation" in finding.reason for finding in weak)
    assert (result.title, result.exit_code) == ("WEAK PASS", 0)
    assert judged(Candidate("noisy", noisy), NOISY_CASE, strict=True).exit_code == 1
    # The plots show a weak tensor against the bound that it was accepted by.
    for sample in result.samples:
        assert (abs(sample.error) <= sample.bound).all()


def test_a_declared_candidate_gets_none() -> None:
    declared = declare(Candidate("noisy", noisy), None, "fp32-blocks-64")
    assert judged(declared, NOISY_CASE).title == "FAIL"


def test_declared_rounding_points_are_what_is_judged() -> None:
    case = Case("odd scaling", 2, 128, 96, 40, 2, 4, torch.bfloat16, scaling=1 / 3, data="balanced")

    def unrounded_z(*, lora_A: Tensor, lora_B: Tensor, **operands: object) -> Tensor:
        wide = {name: x.float() if name == "inputs" else x for name, x in operands.items()}  # type: ignore[union-attr]
        out = mxref.parallel_linear_lora(lora_A=lora_A.float(), lora_B=lora_B.float(), **wide)  # type: ignore[arg-type]
        return out.to(torch.bfloat16)

    def forward_only(points: tuple[str, ...]) -> Status:
        candidate = Candidate("unrounded", unrounded_z, points, ACCUMULATIONS["fp32-blocks-16"])
        (finding,) = judged(candidate, parse_subset("forward").of(case)).findings
        return finding.status

    assert forward_only(("z-unrounded",)) is Status.PASS
    assert forward_only(()) is Status.FAIL


def counting(runs: list[int]) -> Candidate:
    def call(use_fused_dX: bool = False, use_fused_gather: bool = False, **operands: Any) -> Tensor:
        runs.append(1)
        return mxref.parallel_linear_lora(**operands)

    return Candidate("counting", call)


@pytest.mark.parametrize(
    ("names", "runs_a_case"),
    [(tuple(check.name for check in VALUES), 1), (("poison", "unmutated"), 2), (("integer",), 1)],
    ids=str,
)
def test_checks_that_share_their_runs_run_the_candidate_once(names: tuple[str, ...], runs_a_case: int) -> None:
    checks = [check for check in CHECKS if check.name in names]
    items, runs = plan(Scope("small", "cpu"), own=False, checks=checks), list[int]()
    result = run_gate(counting(runs), items, CPU, suite="", seed=0)
    assert len(runs) == runs_a_case * len(checks[0].cases(Scope("small", "cpu")))
    assert {finding.check for finding in result.findings} == set(names)


def test_a_false_alarm_of_drift_is_shared_by_the_whole_run() -> None:
    cases = [SMALL, replace(SMALL, name="wider", N=256), Case("integer", 2, 32, 32, 4, 2, 3, data="integer")]
    items = plan_cases(cases, CPU, 0, VALUES)
    assert slopes_in(items) == items[0].slopes + items[1].slopes > items[0].slopes > 0

    def critical(items: list[Item]) -> set[float | str]:
        findings = run_gate(golden(), items, CPU, suite="", seed=0).findings
        return {finding.details["critical z"] for finding in findings if finding.check == "drift"}

    assert critical(items) == {critical_z(slopes_in(items))}
    assert critical(items[:1]) == {critical_z(items[0].slopes)}


def test_what_is_declined_everywhere_passes_nothing() -> None:
    def declines(**operands: Any) -> Tensor:
        raise mxref.NotCovered("nothing is supported")

    result = run_gate(Candidate("nothing", declines), plan(Scope("small", "cpu"), own=False), CPU, suite="", seed=0)
    assert {finding.status for finding in result.findings} == {Status.NOT_COVERED}
    assert (result.verdict, result.exit_code) == (Status.NOT_COVERED, 1)


def exits(**operands: Any) -> Tensor:
    raise SystemExit(0)


def test_a_candidate_that_ends_its_process_fails() -> None:
    """Its exit code, 0, would read as a pass."""
    (finding,) = judged(Candidate("exits", exits), SMALL).findings
    assert (finding.status, finding.reason) == (Status.FAIL, "raised SystemExit: 0")


def test_global_state_that_is_left_changed_is_a_finding_and_is_put_back() -> None:
    def leaks(**operands: Any) -> Tensor:
        y = mxref.parallel_linear_lora(**operands)
        torch.use_deterministic_algorithms(True)
        torch.set_grad_enabled(False)
        return y

    findings = judged(Candidate("leaks", leaks), SMALL).findings
    (state,) = (finding for finding in findings if finding.check == "state")
    assert state.status is Status.FAIL
    assert "deterministic algorithms changed" in state.reason
    assert "gradients enabled changed" in state.reason
    assert torch.is_grad_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert "state" not in {finding.check for finding in judged(golden(), SMALL).findings}


def test_the_reference_is_computed_after_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(
        run_module, "Expectation", lambda *given, **named: seen.append("reference") or Expectation(*given, **named)
    )

    def call(**operands: Any) -> Tensor:
        seen.append("candidate")
        return mxref.parallel_linear_lora(**operands)

    judged(Candidate("", call), SMALL)
    assert seen == ["candidate", "reference"]


@pytest.mark.gpu
def test_where_the_reference_of_a_small_case_is_computed_changes_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, so that it does not wait its turn on a GPU; a GPU's result must still not be wider."""
    device = torch.device("cuda")
    cases = [replace(SMALL, name=f"{dtype}", dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    places = set[str]()

    def noted(sample: Sample, *given: Any, **named: Any) -> Expectation:
        places.add(sample.problem.device.type)
        return Expectation(sample, *given, **named)

    def found(candidate: Candidate) -> list[tuple[str, str, str, Status, int, int]]:
        result = run_gate(candidate, plan_cases(cases, device, 0), device, suite="", seed=0)
        return [(f.check, f.case, f.tensor, f.status, f.elements, f.violations) for f in result.findings]

    monkeypatch.setattr(run_module, "Expectation", noted)
    wrong = Candidate("wrong", lambda **operands: 1.02 * mxref.parallel_linear_lora(**operands))
    on_cpu = [found(candidate) for candidate in (golden(), wrong)]
    assert places == {"cpu"}
    monkeypatch.setattr(run_module, "_SMALL", 0)
    assert [found(candidate) for candidate in (golden(), wrong)] == on_cpu
    assert places == {"cpu", "cuda"}
    assert {status for *_, status, _, _ in on_cpu[0]} == {Status.PASS}
    assert Status.FAIL in {status for *_, status, _, _ in on_cpu[1]}


def test_a_failure_carries_its_problem_and_its_identifier() -> None:
    wrong = Candidate("wrong", lambda **operands: 2 * mxref.parallel_linear_lora(**operands))
    items = plan_cases([SMALL], CPU, 3)
    failed = [f for f in run_gate(wrong, items, CPU, suite="", seed=3).findings if not f.ok]
    assert {finding.id for finding in failed} == {items[0].id}
    sizes = {"E": 2, "K": 64, "N": 96, "M": 9, "k": 2, "r": 4, "dtype": "float32", "seed": 3, "biases": "yes"}
    assert failed[0].problem.items() >= sizes.items()
    assert plan_cases([SMALL], CPU, 4)[0].id != items[0].id


def test_whatever_a_case_varies_is_told_with_a_failure() -> None:
    usual = Case("usual")
    told = problem_of(usual, 0)
    sizes = {"name", "experts", "K", "N", "tokens", "top_k", "rank", "dtype", "scaling", "covers", "call"}
    for field in fields(Case):
        if field.name not in sizes:
            assert problem_of(replace(usual, **{field.name: "another"}), 0).items() - told.items(), field.name
    for field in fields(Call):
        another = replace(usual, call=replace(usual.call, **{field.name: "another"}))
        assert problem_of(another, 0).items() - told.items(), field.name


def test_modes_and_tracing_that_are_left_active_are_findings_and_end() -> None:
    class Quiet(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    def leaks(**operands: Any) -> Tensor:
        Quiet().__enter__()
        sys.setprofile(lambda *event: None)
        return mxref.parallel_linear_lora(**operands)

    before = sys.getprofile()
    findings = judged(Candidate("leaks", leaks), SMALL).findings
    (state,) = (finding for finding in findings if finding.check == "state")
    assert "active modes changed" in state.reason
    assert "profile function changed" in state.reason
    assert torch._C._len_torch_function_stack() == 0
    assert sys.getprofile() is before


def test_a_profiler_of_the_caller_s_goes_on() -> None:
    with Profile() as profile:
        findings = judged(golden(), SMALL).findings
        assert sys.getprofile() is profile
    assert all(finding.ok for finding in findings)
