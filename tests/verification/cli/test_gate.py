"""The command line: exit codes, one-line errors, files, and what a planted mistake looks like from outside."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gate_command import gate, verdict
from judging import NARROW

from mxref.verification.cases.draw import draw
from mxref.verification.cases.elements import element_cases
from mxref.verification.cli import main
from mxref.verification.gate.process import Refused

pytestmark = pytest.mark.usefixtures("sandbox")

SMALL = ("--shape", "2,32,32,4,2,2")
"""One small problem: no process has to plan a suite."""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a person runs it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-c",
        "import sys; from mxref.verification.cli import main; sys.exit(main())",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


class TestAsAProcess:
    def test_a_pass_with_the_shipped_kernels_interpreted(self) -> None:
        done = run("gate", "--device", "cpu", "--case", "one token", "--case", "integer, no LoRA")
        assert done.returncode == 0, done.stderr
        assert "PASS" in done.stdout
        assert "kernels interpreted" in done.stdout
        assert "error" not in done.stderr
        assert verdict()["counts"]["fail"] == 0
        assert Path("gate-report/gate.html").read_text(encoding="utf-8").startswith("<!doctype html>")

    def test_a_failure(self) -> None:
        done = run("gate", "--device", "cpu", "--kernel", "planted.py:no_lora", "--case", "integer, k 8")
        assert done.returncode == 1
        assert "FAIL" in done.stdout
        assert "integer dA, integer dB" in done.stdout
        assert "error" not in done.stderr

    def test_wrong_use(self) -> None:
        done = run("gate", "--kernel", "absent.py:layer")
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr == "mxref: error: --kernel: no file absent.py\n"


@pytest.mark.parametrize(
    ("kernel", "case", "code", "title"),
    [
        ("composite", "odd sizes", 0, "PASS"),
        ("planted:scale_off_by_one", "balanced", 1, "FAIL"),
        ("planted:no_lora", "balanced", 1, "FAIL"),
        ("planted:nothing", "integer", 1, "FAIL"),
        ("planted:crash", "integer, k 8", 1, "FAIL"),
        ("planted:noisy", "[b]alanced", 0, "WEAK PASS"),
    ],
)
def test_verdicts(kernel: str, case: str, code: int, title: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate("--kernel", kernel, "--case", case) == code
    assert f" {title} " in capsys.readouterr().out
    assert verdict()["exit_code"] == code


def test_a_planted_scale_error_is_located(capsys: pytest.CaptureFixture[str]) -> None:
    assert gate("--kernel", "planted:scale_off_by_one", "--case", "decode") == 1
    assert " FAIL " in capsys.readouterr().out
    assert verdict()["exit_code"] == 1
    failed = [finding for finding in verdict()["findings"] if finding["status"] == "fail"]
    assert {finding["tensor"] for finding in failed} == {"Y", "dX", "dgates"}
    scales = draw(element_cases(torch.float32)[0]).problem.expert_weights.scales
    E, _, blocks = scales.shape
    for finding in failed:
        example = finding["counterexample"]
        if (finding["case"], finding["tensor"]) == ("every finite element, float32", "Y"):
            row, column = example["coordinate"]
            assert scales.view(E, -1, blocks)[row // (32 * blocks), column, row // 32 % blocks] == 121
        assert example["got"] == 2 * example["expected"] != 0


def test_what_is_declined_counts_unless_it_is_declared(capsys: pytest.CaptureFixture[str]) -> None:
    assert gate("--kernel", "planted:no_gates", "--case", "integer, *") == 1
    data = verdict()
    assert data["exit_code"] == 1
    assert data["counts"]["not covered"] > 0
    assert 0 < data["covered"] < 1
    printed = capsys.readouterr().out
    assert " INCOMPLETE " in printed
    assert "gates are not supported" in printed
    assert f"passes what it covers: {int(100 * data['covered'])} %" in printed
    assert gate("--kernel", "planted:no_gates", "--case", "integer, *", "--covers", "gates=none", "--strict") == 0
    assert verdict()["covered"] == 1
    assert "PASS (gates=none; cases matching integer, * only)" in capsys.readouterr().out


def test_the_report_of_an_earlier_run_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("gate-report").mkdir()
    stale = [Path("gate-report") / name for name in ("gate.json", "gate.html")]
    for file in stale:
        file.write_text("stale")

    def refused(*arguments: object, **options: object) -> None:
        raise Refused("nothing like that")

    monkeypatch.setattr("mxref.verification.cli.gate.judge_apart", refused)
    assert gate("--kernel", "golden") == 2
    assert not any(file.exists() for file in stale)


@pytest.mark.parametrize("candidate", ["golden", "planted:crash"])
def test_a_report_that_cannot_be_written(
    candidate: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mxref.verification.cli.gate.write", full)
    code = gate("--kernel", candidate, *SMALL, "--case", "integer, plain")
    captured = capsys.readouterr()
    assert (code, "PASS" in captured.out) == ((2, True) if candidate == "golden" else (1, False))
    assert captured.err.endswith("mxref: error: --out gate-report: No space left on device; no report is kept\n")


def test_a_fault_of_the_gate_s_own_does_not_blame_the_candidate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*arguments: object, **options: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr("mxref.verification.cli.gate.judge_apart", wrong)
    assert gate("--kernel", "golden") == 2
    error = capsys.readouterr().err
    assert error.startswith("mxref: error: the gate itself went wrong, not the candidate: KeyError: 'oops' (")
    assert "Traceback" not in error


def test_strict_fails_a_weak_pass() -> None:
    assert gate("--kernel", "planted:noisy", "--case", "balanced", "--strict") == 1


def test_declarations_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--points", "z-unrounded, scaling-in-B", "--accumulation", "fp32-blocks-128")
    assert gate("--kernel", "planted:correct", *SMALL, "--case", "integer, plain", *options) == 0
    assert verdict()["candidate"]["rounding_points"] == ["z-unrounded", "scaling-in-B"]
    assert verdict()["candidate"]["accumulation"] == "fp32-blocks-128"
    assert verdict()["candidate"]["accumulation_declared"] is True
    capsys.readouterr()
    assert gate("--kernel", "planted.py:correct", "--case", "sentinels") == 0
    assert " PASS " in capsys.readouterr().out
    assert verdict()["exit_code"] == 0
    assert verdict()["candidate"]["accumulation"] == "fp32-blocks-32"


def test_the_seed_changes_the_draw() -> None:
    errors = []
    for seed in ("0", "0", "1"):
        assert gate("--kernel", "composite", *SMALL, "--case", "interval", "--seed", seed) == 0
        errors.append([finding["rms_ulp"] for finding in verdict()["findings"]])
    assert any(errors[0])
    assert errors[0] == errors[1] != errors[2]


def test_list_prints_and_judges_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert gate("--list", "--covers", NARROW) == 0
    quick = capsys.readouterr().out
    assert gate("--list", "--full", "--covers", NARROW) == 0
    full = capsys.readouterr().out
    assert "integer, gates" in quick
    assert len(full.splitlines()) > len(quick.splitlines())
    assert not Path("gate-report").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["nonsense"], "invalid choice"),
        (["gate", "--seed", "x"], "no seed"),
        (["gate", "--seed=-1"], "no seed"),
        (["gate", "--seed", "1.5"], "no seed"),
        (["gate", "--device", "tpu"], "invalid choice"),
        (["gate", "--require-gpu", "--device", "cpu"], "contradicts"),
        (["gate", "--quick", "--full"], "not allowed"),
        (["gate", "--kernel", "absent"], "module:callable"),
        (["gate", "--kernel", "absent_module_of_nobody:layer"], "does not import"),
        (["gate", "--kernel", "planted:absent"], "has no 'absent'"),
        (["gate", "--kernel", "planted:replace.__name__"], "expected a callable"),
        (["gate", "--case", "no case has this name"], "matches nothing"),
        (["gate", "--points", "rounded-twice"], "rounding point 'rounded-twice' is unknown"),
        (["gate", "--accumulation", "magic"], "accumulation 'magic' is unknown"),
        (["gate", "--layers", "0"], "--weights"),
        (["gate", "--covers", "gates=purple"], "'purple' is no class of gates"),
        (["gate", "--dtype", "float16"], "give --shape too"),
        (["gate", "--shape", "8,33,64,16,2,4"], "K a multiple of 32"),
        (["gate", "--timeout", "0"], "expected seconds above 0"),
        (["gate", "--kernel", "golden", "--out", "planted.py"], "--out planted.py"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "gate" in arguments and "--device" not in arguments:
        arguments = [*arguments, "--device", "cpu"]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("mxref: error: ")
    assert captured.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("option", [["--device", "cuda"], ["--require-gpu"]])
def test_a_gpu_that_is_not_there(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gate", *option]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_an_interruption_leaves_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mxref.verification.cli.gate.judge_apart", interrupt)
    assert gate("--kernel", "golden") == 130
    assert capsys.readouterr().err == "mxref: interrupted\n"
