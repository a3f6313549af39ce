"""No check rejects what is right: honest implementations pass under their true declaration, and under no false one.

A stratified part here; `mxref honest` judges every implementation on every kind of data.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mxref.problem import Problem
from mxref.scattermoe import RoundingPoints, expert_order_inputs, forward
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS
from mxref.verification.cases.draw import draw
from mxref.verification.cli import main
from mxref.verification.studies.honest.emulation import Emulated, blocks, tensor_core
from mxref.verification.studies.honest.implementations import Honest, data_cases, emulated, judge

BF16 = torch.bfloat16
IMPLEMENTATIONS = emulated()


def complaints(honest: Honest, data: str, seed: int = 0) -> list[str]:
    case = next(case for case in data_cases(honest.dtype) if case.name == data)
    [(_, findings)] = judge([honest], draw(case, seed=seed))
    assert findings
    return [str(finding) for finding in findings if not finding.ok]


def named(name: str) -> Honest:
    return next(honest for honest in IMPLEMENTATIONS if honest.name == name)


def drawn(data: str) -> Problem:
    return draw(next(case for case in data_cases(BF16) if case.name == data)).problem


def test_there_are_enough_of_both() -> None:
    assert len({honest.name for honest in IMPLEMENTATIONS}) == len(IMPLEMENTATIONS) >= 20
    assert len({case.name for case in data_cases(BF16)}) >= 10


@pytest.mark.parametrize("place", range(len(IMPLEMENTATIONS)), ids=lambda place: IMPLEMENTATIONS[place].name)
def test_an_honest_implementation_passes(place: int) -> None:
    """On two of the ten kinds of data, other ones for its neighbours in the list."""
    honest, cases = IMPLEMENTATIONS[place], data_cases(IMPLEMENTATIONS[place].dtype)
    for case in (cases[place % len(cases)], cases[(place * 3 + 1) % len(cases)]):
        assert complaints(honest, case.name, seed=100 + place) == []


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("sm_90, Z unrounded", "LoRA above all"),
        ("sm_90, LoRA after the rounding", "long sums"),
        ("sm_90, gates before the rounding", "all positive"),
        ("sm_90, s in B", "LoRA above all"),
    ],
)
def test_an_undeclared_rounding_point_is_seen(name: str, data: str) -> None:
    assert complaints(replace(named(name), points=()), data)


def test_truncation_declared_as_rounding_is_seen() -> None:
    """Sums of positive numbers, seen in fp32: each step of a tensor core loses a little, and always downwards."""
    assert complaints(named("sm_80"), "all positive") == []
    wider = replace(named("sm_80"), dtype=torch.float32, how=ACCUMULATIONS["fp32-blocks-64"])
    unrounded = Emulated(tensor_core(8, 24), None, RoundingPoints.contract(torch.float32))
    assert complaints(replace(wider, run=unrounded.run), "all positive")


def test_a_dropped_step_is_seen() -> None:
    broken = Emulated(blocks(64), None, RoundingPoints.contract(torch.float32), broken="one step dropped")
    honest = replace(named("fp32 in tiles of 64, fp32"), run=broken.run)
    for case in data_cases(torch.float32):
        assert complaints(honest, case.name), case.name


def test_the_kinds_of_data_are_what_they_are_called() -> None:
    def terms(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """|x·W|, |x|·|W| and the whole of Y, by element."""
        x, y = expert_order_inputs(problem), forward(problem, RoundingPoints.contract(BF16)).y.exact
        own = [(slice(start, end), problem.expert_weight(e)) for e, start, end in problem.segments()]
        base = torch.cat([x[rows] @ W for rows, W in own])
        return base.abs(), torch.cat([x[rows].abs() @ W.abs() for rows, W in own]), y[: base.shape[0]].abs()

    def ratio(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a / b).median())

    base, magnitude, _ = terms(drawn("cancelling sums"))
    cancelled = ratio(base, magnitude)
    base, magnitude, _ = terms(drawn("plain"))
    assert cancelled < ratio(base, magnitude) / 3
    base, magnitude, whole = terms(drawn("all positive"))
    assert torch.equal(base, magnitude)
    assert bool((whole >= base).all())
    for data in ("LoRA above all", "bias above all"):
        base, _, whole = terms(drawn(data))
        assert ratio(whole, base) > 10, "an order of magnitude"


def test_the_command_counts_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--name", "fused multiply-adds", "--data", "integers", "--data", "plain"]
    assert main(["honest", *options, "--seeds", "2", "--jobs", "1", "--out", str(tmp_path)]) == 0
    assert "0 failures in 8 judgements of 2 honest implementations" in capsys.readouterr().out
    assert json.loads((tmp_path / "honest.json").read_text())["judgements"] == 8
    assert main(["honest", "--device", "cpu", "--name", "nobody"]) == 2


@pytest.mark.gpu
@pytest.mark.minutes
def test_the_kernels_pass_under_every_configuration_that_dispatch_can_reach() -> None:
    """Two draws of each kind of data, and two covering arrays of the domain: 1,400 judgements."""
    assert main(["honest", "--device", "cuda", "--seeds", "2"]) == 0
