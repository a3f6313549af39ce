"""What is planned: every suite asks what it says, and only whom it should."""

from __future__ import annotations

import pytest
import torch
from judging import NARROW

from mxref.verification.cases.case import Case
from mxref.verification.cases.scope import Scope, Suite
from mxref.verification.cases.subset import parse_subset
from mxref.verification.checks.check import Asked
from mxref.verification.checks.registry import CHECKS, INTERVAL, SIGN
from mxref.verification.gate.plan import Item, matches, plan, plan_cases

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def names(suite: Suite, device: torch.device, own: bool, covers: str = "") -> set[str]:
    scope = Scope(suite, device.type, subset=parse_subset(covers))
    return {check.name for item in plan(scope, own) for check in item.checks}


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("own", [False, True])
def test_each_suite_asks_what_the_smaller_one_does(device: torch.device, own: bool) -> None:
    small, quick = (names(suite, device, own) for suite in ("small", "quick"))
    full = names("full", device, own, NARROW)
    assert small < quick <= full
    assert quick - small == {"configurations", "subsets"}


@pytest.mark.parametrize(
    ("device", "own", "asked"),
    [
        (CPU, False, {Asked.ANY}),
        (CUDA, False, {Asked.ANY}),
        (CPU, True, {Asked.ANY, Asked.OWN, Asked.INTERPRETED}),
        (CUDA, True, {Asked.ANY, Asked.OWN, Asked.OWN_ON_GPU}),
    ],
)
def test_a_check_is_asked_of_whom_it_says(device: torch.device, own: bool, asked: set[Asked]) -> None:
    assert names("quick", device, own) == {check.name for check in CHECKS if check.asked in asked}


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_what_may_end_the_use_of_the_gpu_comes_last(device: torch.device) -> None:
    order = [item.checks[0].name for item in plan(Scope("small", device.type), own=True)]
    assert order == sorted(order, key=[check.name for check in CHECKS].index)
    assert (order[-1] == "guard pages") == (device.type == "cuda")


def test_given_cases_are_asked_by_what_fits_them() -> None:
    exact, drawn = plan_cases([Case("a", data="integer"), Case("b")], CPU, 0, (INTERVAL, SIGN))
    assert [check.name for check in exact.checks] == ["integer"]
    assert [check.name for check in drawn.checks] == ["interval", "sign"]


def test_a_sample_is_drawn_once() -> None:
    (item,) = plan_cases([Case("a")], CPU, 0)
    assert item.sample is item.sample


def test_items_are_chosen_by_case_or_by_check() -> None:
    (item,) = plan_cases([Case("one token")], CPU, 0, (INTERVAL, SIGN))
    assert item.fits([])
    assert item.fits(["token"])
    assert item.fits(["sign"])
    assert not item.fits(["drift", "two*"])


@pytest.mark.parametrize(
    ("name", "patterns", "fits"),
    [
        ("integer, gates", [], True),
        ("integer, gates", ["GATES"], True),
        ("integer, gates", ["integer*"], True),
        ("integer, gates", ["gates*"], False),
        ("integer, gates", ["decode", "gat?s", "*gates"], True),
    ],
)
def test_names_and_patterns(name: str, patterns: list[str], fits: bool) -> None:
    assert matches(name, patterns) is fits


def test_what_a_candidate_does_not_cover_is_not_asked() -> None:
    def asked(covers: str) -> list[Item]:
        return plan(Scope("quick", "cpu", subset=parse_subset(covers)), own=False)

    every, forward = asked(""), asked("forward")
    assert "second backward" in {check.name for item in every for check in item.checks}
    for covers in ("forward", "one backward"):
        assert "second backward" not in {check.name for item in asked(covers) for check in item.checks}
    assert all(not item.case.call.wants("dX") for item in forward if isinstance(item.case, Case))
    assert any(item.case.call.wants("dX") for item in asked("one backward") if isinstance(item.case, Case))
    ungated = [item.case for item in asked("gates=none") if isinstance(item.case, Case)]
    assert 0 < len(ungated) < len(every)
    assert not any(case.gate_slots for case in ungated)
