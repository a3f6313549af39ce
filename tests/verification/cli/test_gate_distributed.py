"""`mxref gate --distributed`: verdicts, exit codes, wrong use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mxref.verification.cli import main
from mxref.verification.cli.own import gate_steps
from mxref.verification.distributed.cases import CASES
from mxref.verification.records.freshness import survey
from mxref.verification.records.kernel_sources import step_sources

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


def test_a_failed_item_is_asked_again_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate(tmp_path, f"{SUMS}:Narrow") == 1
    kept = json.loads((tmp_path / "gate.json").read_text())
    [(case, identifier)] = {(f["case"], f["id"]) for f in kept["findings"] if f["status"] == "fail"}
    command = f"mxref gate --distributed --step {SUMS}:Narrow --world 2 --device cpu --seed 0 --rerun {identifier}"
    assert command in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert main([*command.split()[1:], "--out", str(tmp_path)]) == 1
    again = json.loads((tmp_path / "gate.json").read_text())
    assert {finding["case"] for finding in again["findings"]} == {case}
    assert main([*command.split()[1:-1], "00000000"]) == 2
    assert main([*command.split()[1:], "--rerun", "00000000", "--out", str(tmp_path)]) == 2
    assert "--rerun 00000000 matches nothing" in capsys.readouterr().err


def test_a_whole_run_of_an_own_step_is_kept_as_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_steps, "CASES", CASES[:1])
    monkeypatch.setattr(gate_steps, "_WORLDS", (2,))
    command = ["gate", "--distributed", "--device", "cpu", "--out", str(tmp_path), "--record", str(tmp_path)]
    assert main([*command, "--step", "fully-sharded"]) == 0
    [state] = survey(tmp_path)
    assert (state.kind, state.folder, state.fresh) == ("steps-fully-sharded", "interpreter-cpu", True)
    assert (state.entry["worlds"], state.entry["backend"], state.entry["passed"]) == ([2], "gloo", True)
    [stale] = survey(tmp_path, step_sources() | {"kernels/parallel/sharding.py": "other = 1"})
    assert stale.changed == ("kernels/parallel/sharding.py",)


@pytest.mark.parametrize("narrowed", [["--step", "plain"], ["--world", "2"], ["--case", "two"], ["--rerun", "0"]])
def test_a_part_is_no_evidence(tmp_path: Path, narrowed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gate", "--distributed", "--device", "cpu", "--record", str(tmp_path), *narrowed]) == 2
    assert "--record keeps every case" in capsys.readouterr().err


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
        ["--distributed", "--case", "two steps", "--processes", "2"],
        ["--distributed", "--world", "0,2"],
        ["--distributed", "--world", "two"],
    ],
)
def test_wrong_use(tmp_path: Path, arguments: list[str]) -> None:
    assert main(["gate", "--device", "cpu", "--out", str(tmp_path), *arguments]) == 2
