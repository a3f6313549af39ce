"""The gate adds findings up, gives undeclared candidates their second chance, and knows what it can judge."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import torch
from judging import integers
from torch import Tensor

import mxref
from mxref.problem import Problem
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS, Accumulation
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.loading import declare, load
from mxref.verification.candidates.shipped import golden, torch_composite
from mxref.verification.cases.case import Case
from mxref.verification.cases.draw import draw
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.gate.run import GateResult, Step, case_steps, decode_steps, run_gate

CPU = torch.device("cpu")
SMALL = Case("small", 2, 64, 96, 9, 2, 4, bias=True, gate_slots=2)
BF16 = Case("bf16", 3, 64, 96, 21, 2, 4, torch.bfloat16, torch.float32, bias=True, gate_slots=2, routing="sentinels")


def judged(candidate: Candidate, *cases: Case, strict: bool = False) -> GateResult:
    return run_gate(candidate, case_steps(cases, CPU, 0), CPU, suite="test", seed=0, strict=strict)


def result_of(*statuses: Status, strict: bool = False) -> GateResult:
    findings = [Finding("interval", "case", f"T{i}", status, "", 1, 0) for i, status in enumerate(statuses)]
    how = ACCUMULATIONS["fp32-blocks-64"]
    return GateResult(golden(), how, "device", "suite", 0, strict, findings)


@pytest.mark.parametrize(
    ("statuses", "title", "code", "strict_code"),
    [
        ([Status.PASS, Status.PASS], "PASS", 0, 0),
        ([Status.PASS, Status.NOT_COVERED], "PASS", 0, 1),
        ([Status.PASS, Status.WEAK], "WEAK PASS", 0, 1),
        ([Status.WEAK, Status.FAIL], "FAIL", 1, 1),
        ([Status.NOT_COVERED, Status.NOT_COVERED], "FAIL", 1, 1),
        ([], "FAIL", 1, 1),
    ],
)
def test_findings_add_up(statuses: list[Status], title: str, code: int, strict_code: int) -> None:
    assert (result_of(*statuses).title, result_of(*statuses).exit_code) == (title, code)
    assert result_of(*statuses, strict=True).exit_code == strict_code


@pytest.mark.parametrize("case", [SMALL, BF16, *integers("cpu")], ids=lambda case: case.name)
def test_composite_agrees_with_the_golden_model(case: Case) -> None:
    result = judged(torch_composite(), case)
    assert [f for f in result.findings if f.status is not Status.PASS] == []


def test_composite_rounds_where_the_contract_does() -> None:
    sample = draw(BF16, CPU, seed=3)
    golden, composite = golden().run(sample), torch_composite().run(sample)
    for tensor in ("Y", "dX"):
        mine, theirs = composite[tensor], golden[tensor]
        assert mine is not None
        assert theirs is not None
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, theirs), tensor


def test_golden_decodes_exhaustively() -> None:
    steps = decode_steps(CPU)
    result = run_gate(golden(), steps, CPU, suite="decode", seed=0)
    assert result.title == "PASS"
    assert {finding.check for finding in result.findings} == {"decode"}


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
        candidate = Candidate(
            "unrounded", lambda **o: unrounded_z(**o).detach(), points, ACCUMULATIONS["fp32-blocks-16"]
        )
        return next(f.status for f in judged(candidate, case).findings if f.tensor == "Y")

    assert forward_only(("z-unrounded",)) is Status.PASS
    assert forward_only(()) is Status.FAIL


def test_what_a_complete_candidate_declines_is_a_failure() -> None:
    def declines(**operands: object) -> Tensor:
        raise NotImplementedError("not today")

    assert judged(Candidate("partial", declines), SMALL).findings[0].status is Status.NOT_COVERED
    finding = judged(Candidate("complete", declines, complete=True), SMALL).findings[0]
    assert finding.status is Status.FAIL
    assert "not today" in finding.reason


def test_a_keyword_the_callable_lacks_is_a_gap_only_where_it_matters() -> None:
    signature = Problem.__annotations__.keys() - {"gates"}

    def no_gates(**operands: object) -> Tensor:
        assert operands.keys() <= signature
        return mxref.parallel_linear_lora(**operands)  # type: ignore[arg-type]

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in sorted(signature)]
    no_gates.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    plain = Case("plain", 2, 64, 96, 9, 2, 4, bias=True, use_fused_dX=True)
    result = judged(Candidate("no gates", no_gates), plain, SMALL)
    assert {f.status for f in result.findings if f.case == "plain"} == {Status.PASS}
    assert [(f.status, "'gates'" in f.reason) for f in result.findings if f.case == "small"] == [
        (Status.NOT_COVERED, True)
    ]


def test_a_detached_result_covers_the_forward_alone() -> None:
    candidate = Candidate("detached", lambda **operands: mxref.parallel_linear_lora(**operands).detach())
    statuses = {finding.tensor: finding.status for finding in judged(candidate, SMALL).findings}
    assert statuses.pop("Y") is Status.PASS
    assert set(statuses.values()) == {Status.NOT_COVERED}


def test_the_candidate_works_on_copies() -> None:
    def scribble(**operands: Tensor) -> Tensor:
        out = mxref.parallel_linear_lora(**operands)  # type: ignore[arg-type]
        operands["inputs"].detach().zero_()
        return out.detach()

    sample = draw(SMALL, CPU)
    before = sample.problem.inputs.clone()
    Candidate("scribble", scribble).run(sample)
    assert torch.equal(sample.problem.inputs, before)


def test_progress_is_told_before_each_step() -> None:
    seen: list[str] = []
    steps = [Step("integer", name, lambda candidate, how: ([], [])) for name in ("a", "b")]
    run_gate(golden(), steps, CPU, suite="", seed=0, on_step=lambda step: seen.append(step.case))
    assert seen == ["a", "b"]


@pytest.fixture
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.usefixtures("own_path")
class TestLoad:
    SOURCE = """
from mxref import parallel_linear_lora
def layer(**operands):
    return parallel_linear_lora(**operands)
layer.mxref_points = ("z-unrounded",)
layer.mxref_accumulation = "fp32-blocks-32"
class holder:
    layer = staticmethod(layer)
number = 3
def odd(): ...
odd.mxref_points = "rounded-twice"
"""

    def test_declarations_come_from_the_callable_or_the_caller(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.py"
        file.write_text(self.SOURCE)
        own = load(f"{file}:layer")
        assert own.declared_points == ("z-unrounded",)
        assert own.accumulation == ACCUMULATIONS["fp32-blocks-32"]
        assert own.points(torch.bfloat16).z is False
        told = load(f"{file}:holder.layer", [], "undeclared")
        assert told.declared_points == ()
        assert told.accumulation == ACCUMULATIONS["undeclared"]

    def test_modules_of_the_current_folder_come_after_installed_ones(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("")
        (tmp_path / "only_here_layer.py").write_text(self.SOURCE)
        monkeypatch.chdir(tmp_path)
        before = list(sys.path)
        assert load("only_here_layer:layer").name == "only_here_layer:layer"
        assert sys.path == [*before, str(tmp_path)]

    @pytest.mark.parametrize(
        ("attribute", "message"),
        [("absent", "has no 'absent'"), ("number", "expected a callable"), ("odd", "'rounded-twice' is unknown")],
    )
    def test_errors_say_what_is_wrong(self, tmp_path: Path, attribute: str, message: str) -> None:
        file = tmp_path / "mine.py"
        file.write_text(self.SOURCE)
        with pytest.raises(ValueError, match=message):
            load(f"{file}:{attribute}")

    @pytest.mark.parametrize("source", ["import nothing_of_that_name", "def (", "import sys; sys.exit(0)"])
    def test_a_file_that_does_not_import(self, tmp_path: Path, source: str) -> None:
        file = tmp_path / "broken.py"
        file.write_text(source)
        with pytest.raises(ValueError, match="does not import"):
            load(f"{file}:layer")


def test_accumulations_are_described() -> None:
    assert candidates.describe(ACCUMULATIONS["fp32-blocks-64"]) == "fp32-blocks-64"
    own = Accumulation("fp32_blocks", step=48, lora="apart")
    assert candidates.describe(own) == "fp32 in blocks of 48, LoRA product apart, bias last"
