"""Failures by cause."""

from __future__ import annotations

from dataclasses import replace

from mxref.verification.checks.finding import Counterexample, Finding, Status
from mxref.verification.report.causes import causes

SHOWN = Counterexample((0, 0), 1.0, 2.0, 2.0, 2.0)
COLUMN = Finding(
    "interval", "wide", "Y", Status.FAIL, "column 95 of 96 only; 9", 96, 9, counterexample=SHOWN, id="1",
    patterns=("column 95 of 96 only",),
)  # fmt: skip
EXACT = replace(COLUMN, check="integer", case="small", id="2", patterns=("column 32 of 33 only",))
SIGN = replace(COLUMN, check="sign", patterns=())
ELSEWHERE = replace(SIGN, tensor="dX", id="7")
CRASH = Finding("decode", "a", "all", Status.FAIL, "raised RuntimeError: misaligned address 0x7f00", 0, 0, id="3")
AGAIN = replace(CRASH, case="b", reason="raised RuntimeError: misaligned address 0x7f11", id="4")


def test_failures_that_look_alike_stand_together() -> None:
    found = causes([COLUMN, SIGN, ELSEWHERE, CRASH, EXACT, replace(EXACT, status=Status.PASS), AGAIN])
    assert [cause.naming for cause in found] == [CRASH, EXACT, ELSEWHERE]
    assert found[0].others == (AGAIN,)
    assert set(found[1].others) == {COLUMN, SIGN}
    assert found[1].cases == ["wide"]
    assert causes([replace(CRASH, status=Status.PASS)]) == []


def test_what_the_problems_of_a_cause_have_in_common() -> None:
    usual = {"E": 4, "dtype": "float32", "autocast": "forward pass", "seed": 0}
    many = [replace(CRASH, id=str(n), case=str(n), problem=usual | {"E": n, "routing": "uniform"}) for n in range(3)]
    (cause,) = causes(many)
    assert cause.common == {"dtype": "float32", "autocast": "forward pass", "routing": "uniform"}
    assert causes(many[:2])[0].common == {}


def test_a_power_of_two_names_a_cause_wherever_it_is() -> None:
    here = replace(EXACT, patterns=("column 32 of 33 only", "ratio 2^−1"))
    there = replace(COLUMN, patterns=("every element", "ratio 2^−1"), elements=1, check="integer")
    other = replace(COLUMN, patterns=("every element", "ratio 2^−2"), id="9")
    found = causes([there, other, here])
    assert [(cause.naming, cause.others) for cause in found] == [(here, (there,)), (other, ())]
