"""What wrong elements have in common, in words; and failures by cause."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from judging import ask
from torch import Tensor

import mxref
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.cases.case import Case
from mxref.verification.cases.draw import draw
from mxref.verification.checks.elements import axes_of
from mxref.verification.checks.finding import Status
from mxref.verification.checks.patterns import Axis, patterns

EXPERTS = torch.tensor([0, 0, 1, 1, 2, 2, -1, 3])
AXES = (Axis("row", (("expert", EXPERTS),)), Axis("column", block=32))


def at(rows: Any, columns: Any) -> Tensor:
    wrong = torch.zeros(8, 96, dtype=torch.bool)
    wrong[rows, columns] = True
    return wrong


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (at(slice(None), slice(None)), ["every element"]),
        (at(slice(None), 95), ["column 95 of 96 only"]),
        (at(slice(None), slice(64, 96)), ["the last 32 of 96 columns, from 64 on"]),
        (at(slice(None), slice(32, 64)), ["K-block 1 only (columns 32 to 63)"]),
        (at(slice(None), slice(1, None, 2)), ["one column in 2, from 1 on"]),
        (at(slice(None), [3, 50]), ["columns 3, 50 of 96 only"]),
        (at(slice(4, 6), slice(None)), ["every row of expert 2, and no other"]),
        (at(5, slice(None)), ["row 5 of 8 only (expert 2)"]),
        (at([2, 3, 4, 5], 7), ["every row of experts 1, 2, and no other", "column 7 of 96 only"]),
        (at(6, slice(None)), ["row 6 of 8 only"]),
        (at([0, 2, 3, 5, 7], [1, 40, 3, 80, 10]), []),
    ],
)
def test_where_wrong_elements_lie(wrong: Tensor, said: list[str]) -> None:
    exact = torch.randn(wrong.shape, dtype=torch.float64) + 4
    got = torch.where(wrong, exact + torch.rand(wrong.shape, dtype=torch.float64), exact)
    assert patterns(wrong, got, exact, AXES) == said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x / 2, ["ratio 2^−1"]),
        (lambda x: 8 * x, ["ratio 2^3"]),
        (lambda x: -4 * x, ["ratio −2^2"]),
        (lambda x: -x, ["ratio −1"]),
        (lambda x: 0 * x, ["all of them zero"]),
        (lambda x: torch.nan * x, ["all of them NaN"]),
        (lambda x: 1.5 * x, []),
    ],
)
def test_which_ratio_they_have(change: Callable[[Tensor], Tensor], said: list[str]) -> None:
    exact = torch.randn(8, 96, dtype=torch.float64) + 4
    wrong = torch.ones(8, 96, dtype=torch.bool)
    assert patterns(wrong, change(exact), exact, AXES) == ["every element", *said]


def test_zeros_that_are_right_say_nothing() -> None:
    exact = torch.zeros(8, 96, dtype=torch.float64)
    exact[::2, ::3] = 4.0
    wrong = exact != 0
    assert patterns(wrong, exact / 2, exact, AXES) == ["every element", "ratio 2^−1"]
    wrong[:, :48] = False
    assert patterns(wrong, exact / 2, exact, AXES)[0] == "the last 48 of 96 columns, from 48 on"


@pytest.mark.parametrize("options", [{}, {"gate_slots": 2}, {"grouped_out": True}, {"grouped_in": True, "top_k": 1}])
def test_axes_fit_the_results(options: dict[str, Any]) -> None:
    case = Case("axes", 3, 64, 96, 8, rank=4, bias=True, routing="sentinels", **options)
    sample = draw(case)
    for tensor, x in Candidate("golden", mxref.parallel_linear_lora).run(sample).items():
        assert x is not None
        for size, axis in zip(x.shape, axes_of(sample, tensor), strict=True):
            assert all(group.numel() == size for _, group in axis.groups), tensor


def test_a_failure_says_what_its_elements_have_in_common() -> None:
    def last_column(**operands: Any) -> Tensor:
        y = mxref.parallel_linear_lora(**operands)
        return y * torch.where(torch.arange(y.shape[1]) == y.shape[1] - 1, 0.5, 1.0)

    def expert_1(**operands: Any) -> Tensor:
        y = mxref.parallel_linear_lora(**operands)
        mine = (operands["sorted_expert_idxs"] == 1)[operands["sorted_scattered_idxs"].argsort()]
        return y * torch.where(mine, 2.0, 1.0)[:, None]

    case = Case("integer", 4, 64, 96, 16, data="integer")
    for wrong, said in ((last_column, "column 95 of 96 only"), (expert_1, "every row of expert 1, and no other")):
        finding = next(f for f in ask("integer", Candidate("wrong", wrong), draw(case)) if f.tensor == "Y")
        assert finding.status is Status.FAIL
        assert finding.patterns[0] == said
        assert finding.reason.startswith(said)
