"""`mxref gate --distributed`: verdicts, exit codes, wrong use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mxref.verification.cli import main

SUMS = "mxref.verification.studies.steps.sums"


def gate(tmp_path: Path, step: str, *arguments: str) -> int:
    few = ["--world", "2", "--case", "two steps", "--case", "ordinary numbers", "--device", "cpu"]
    return main(["gate", "--distributed", "--step", step, "--out", str(tmp_path), *few, *arguments])


def test_an_honest_step_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate(tmp_path, "plain") == 0
    out = capsys.readouterr().out
    assert "PASS (cases matching two steps or ordinary numbers only)" in out
    assert "float32, any" in out
    kept = json.loads((tmp_path / "gate.json").read_text())
    assert kept["exit_code"] == 0
    assert set(kept["checks"]) >= {finding["check"] for finding in kept["findings"]}
    assert "two steps, 2 ranks" in (tmp_path / "gate.html").read_text()


def test_a_wrong_step_fails_and_is_told_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate(tmp_path, f"{SUMS}:SummedTwice", "--fail-fast") == 1
    assert "2 times what it should be" in capsys.readouterr().out
    cases = {finding["case"] for finding in json.loads((tmp_path / "gate.json").read_text())["findings"]}
    assert not [case for case in cases if case.startswith("ordinary")]


def test_what_is_no_answer_is_the_step_s_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate(tmp_path, "ranks_questions:returns_nothing") == 1
    assert "returned NoneType; expected Trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (
            "nobody",
            "--step is 'nobody'; expected experts-in-parallel, fully-sharded, two-dimensions, plain, module",
        ),
        ("no.such.module:step", "does not import"),
        (f"{SUMS}:Nothing", "has no 'Nothing'"),
        ("ranks_questions:declares_nonsense", "mxref_reduction is 'float64, sideways'"),
    ],
)
def test_no_such_step(tmp_path: Path, capsys: pytest.CaptureFixture[str], step: str, said: str) -> None:
    assert gate(tmp_path, step) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--step", "plain"],
        ["--world", "2"],
        ["--distributed", "--kernel", "golden"],
        ["--distributed", "--covers", "forward"],
        ["--distributed", "--case", "nobody"],
        ["--distributed", "--world", "0,2"],
        ["--distributed", "--world", "two"],
    ],
)
def test_wrong_use(tmp_path: Path, arguments: list[str]) -> None:
    assert main(["gate", "--device", "cpu", "--out", str(tmp_path), *arguments]) == 2
