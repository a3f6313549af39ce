"""A candidate that changes the code which judges it is told, and what it changed is put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from uninterpreted import run_python

from mxref import scattermoe
from mxref.verification.arithmetic.accumulation import default_accumulation
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.own_code import OwnCode
from mxref.verification.candidates.starting_point import layer
from mxref.verification.cases.case import Case
from mxref.verification.checks import elements, strata
from mxref.verification.checks.expectation import Expectation
from mxref.verification.checks.finding import Status
from mxref.verification.checks.registry import CHECKS
from mxref.verification.gate.plan import plan_cases
from mxref.verification.gate.run import judge

LOOKS = """
import sys
from mxref.verification.candidates.global_state import GlobalState
from mxref.verification.candidates.own_code import OwnCode
from mxref.verification.gate import process

OwnCode.now().restore(), GlobalState.now().restore()
print("torch._dynamo" in sys.modules)
"""


def _other(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("in place of what judges")


@pytest.mark.parametrize(
    ("holder", "name"),
    [(scattermoe, "forward"), (elements, "compare"), (Expectation, "exact"), (torch, "where"), (torch.Tensor, "sum")],
)
def test_what_is_replaced_is_named_and_put_back(holder: Any, name: str) -> None:
    code, before = OwnCode.now(), getattr(holder, name)
    assert code.restore() == []
    setattr(holder, name, _other)
    [told] = code.restore()
    assert told.endswith(f".{name} was replaced")
    assert getattr(holder, name) is before or getattr(holder, name) == before
    assert code.restore() == []


def test_a_look_does_not_import_torch_s_compiler() -> None:
    """Seconds of every process that judges."""
    done = run_python("-c", LOOKS)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_a_function_s_code_counts_too() -> None:
    code, before = OwnCode.now(), elements.compare.__code__
    elements.compare.__code__ = _other.__code__
    assert code.restore() == ["mxref.verification.checks.elements.compare was replaced"]
    assert elements.compare.__code__ is before


@pytest.mark.parametrize(
    ("holder", "name", "told"),
    [
        (Status, "FAIL", "finding.Status.FAIL"),
        (Status.FAIL, "_value_", "finding.Status._value_"),
        (strata, "SINGULAR", "strata.SINGULAR"),
        (CHECKS[0], "compare", "check.Check.compare"),
    ],
)
def test_constants_and_members_and_what_a_list_holds_count_too(holder: Any, name: str, told: str) -> None:
    code, before = OwnCode.now(), getattr(holder, name)
    (type if isinstance(holder, type) else object).__setattr__(holder, name, _other)
    assert code.restore() == [f"mxref.verification.checks.{told} was replaced"]
    assert getattr(holder, name) is before
    assert code.restore() == []


def test_a_candidate_that_changes_the_question_fails() -> None:
    """The sample lies in its process, where a garbage collector finds it."""

    def call(**operands: Any) -> torch.Tensor:
        assert item.sample.problem.lora_B is not None
        item.sample.problem.lora_B.data.zero_()
        return layer(**operands | {"lora_B": operands["lora_B"] - operands["lora_B"].detach()})

    [item] = plan_cases([Case("one", data="integer", scaling=0.5)], torch.device("cpu"), 0)
    findings = judge(item, Candidate("asker", call), default_accumulation(torch.device("cpu")))
    wrong = [finding for finding in findings if not finding.ok]
    assert [finding.check for finding in wrong] == ["integer", "state"]
    assert "the question was changed" in wrong[-1].reason


def test_a_candidate_that_takes_the_checks_out_of_its_item_is_judged_all_the_same() -> None:
    def call(**operands: Any) -> torch.Tensor:
        vars(item)["checks"] = ()
        return 2 * layer(**operands)

    [item] = plan_cases([Case("one", data="integer", scaling=0.5)], torch.device("cpu"), 0)
    findings = judge(item, Candidate("empty", call), default_accumulation(torch.device("cpu")))
    assert "integer" in {finding.check for finding in findings if not finding.ok}


def test_a_candidate_that_judges_itself_fails() -> None:
    def call(**operands: Any) -> torch.Tensor:
        vars(elements)["compare"] = _other
        return layer(**operands)

    [item] = plan_cases([Case("one", data="integer", scaling=0.5)], torch.device("cpu"), 0)
    findings = judge(item, Candidate("itself", call), default_accumulation(torch.device("cpu")))
    wrong = [finding for finding in findings if not finding.ok]
    assert [finding.check for finding in wrong] == ["state"]
    assert "elements.compare was replaced" in wrong[0].reason
