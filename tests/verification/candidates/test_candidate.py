"""What a callable may leave out, how it is found, and plain PyTorch beside the golden model."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from judging import ask, integers
from torch import Tensor

import mxref
from mxref.problem import Problem
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.loading import load
from mxref.verification.candidates.shipped import golden, torch_composite
from mxref.verification.cases.case import Case
from mxref.verification.cases.draw import draw
from mxref.verification.checks.finding import Status

SMALL = Case("small", 2, 64, 96, 9, 2, 4, bias=True, gate_slots=2)
BF16 = Case("bf16", 3, 64, 96, 21, 2, 4, torch.bfloat16, torch.float32, bias=True, gate_slots=2, routing="sentinels")


@pytest.mark.parametrize("case", [SMALL, BF16, *integers("cpu")], ids=lambda case: case.name)
def test_plain_pytorch_agrees_with_the_golden_model(case: Case) -> None:
    findings = ask("integer" if case.exact else "interval", torch_composite(), draw(case))
    assert findings
    assert [str(finding) for finding in findings if finding.status is not Status.PASS] == []


def test_plain_pytorch_rounds_where_the_contract_does() -> None:
    sample = draw(BF16, seed=3)
    expected, got = golden().run(sample), torch_composite().run(sample)
    for tensor in ("Y", "dX"):
        mine, theirs = got[tensor], expected[tensor]
        assert mine is not None
        assert theirs is not None
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, theirs), tensor


def test_a_keyword_the_callable_lacks_is_a_gap_only_where_it_matters() -> None:
    signature = Problem.__annotations__.keys() - {"gates"}

    def no_gates(**operands: Any) -> Tensor:
        assert operands.keys() <= signature
        return mxref.parallel_linear_lora(**operands)

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in sorted(signature)]
    no_gates.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    candidate = Candidate("no gates", no_gates)
    plain = Case("plain", 2, 64, 96, 9, 2, 4, bias=True, use_fused_dX=True)
    assert {finding.status for finding in ask("interval", candidate, draw(plain))} == {Status.PASS}
    (finding,) = ask("interval", candidate, draw(SMALL))
    assert finding.status is Status.NOT_COVERED
    assert "'gates'" in finding.reason


def test_a_detached_result_covers_the_forward_alone() -> None:
    candidate = Candidate("detached", lambda **operands: mxref.parallel_linear_lora(**operands).detach())
    statuses = {finding.tensor: finding.status for finding in ask("interval", candidate, draw(SMALL))}
    assert statuses.pop("Y") is Status.PASS
    assert set(statuses.values()) == {Status.NOT_COVERED}


def test_the_candidate_works_on_copies() -> None:
    def scribble(**operands: Any) -> Tensor:
        out = mxref.parallel_linear_lora(**operands)
        operands["inputs"].detach().zero_()
        return out.detach()

    sample = draw(SMALL)
    before = sample.problem.inputs.clone()
    Candidate("scribble", scribble).run(sample)
    assert torch.equal(sample.problem.inputs, before)


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
