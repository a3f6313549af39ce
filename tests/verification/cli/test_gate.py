"""The command line: exit codes, one-line errors, files, and what a planted mistake looks like from outside."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from judging import NARROW

from mxref import MXWeights, encode_mxfp4
from mxref.checkpoints.gpt_oss import write_expert_weights
from mxref.verification.cases.draw import draw
from mxref.verification.cases.elements import element_cases
from mxref.verification.cli import main
from mxref.verification.gate.process import Refused

PLANTED = """
from dataclasses import replace
import torch
from mxref import MXWeights, NotCovered, parallel_linear_lora

def correct(**operands):
    return parallel_linear_lora(**operands)
correct.mxref_accumulation = "fp32-blocks-32"

def scale_off_by_one(*, expert_weights, **operands):
    if isinstance(expert_weights, MXWeights):
        scales = expert_weights.scales.clone()
        scales[scales == 121] += 1
        expert_weights = replace(expert_weights, scales=scales)
    return parallel_linear_lora(expert_weights=expert_weights, **operands)

def no_lora(*, lora_A=None, lora_B=None, **operands):
    return parallel_linear_lora(**operands)

def no_gates(*, gates=None, **operands):
    if gates is not None:
        raise NotCovered("gates are not supported")
    return parallel_linear_lora(**operands)

def nothing(**operands):
    raise NotCovered("nothing is supported")

def crash(**operands):
    raise RuntimeError("out of luck")

def noisy(**operands):
    y = parallel_linear_lora(**operands)  # no mean error, or it would be drift
    return y * (1 + 4e-5 * (-1) ** torch.arange(y.shape[1]))
"""


@pytest.fixture(autouse=True)
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of our own, and this process's import state put back: the command changes both."""
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "1"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planted.py").write_text(PLANTED)
    return tmp_path


SMALL = ("--shape", "2,32,32,4,2,2")
"""One small problem: no process has to plan a suite."""


def gate(*arguments: str) -> int:
    return main(["gate", "--device", "cpu", *arguments])


def verdict() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(Path("gate-report/gate.json").read_text(encoding="utf-8"))
    return data


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


def expert_stack(experts: int, n: int, k: int) -> MXWeights:
    draw = torch.Generator().manual_seed(experts * n + k)
    return encode_mxfp4(torch.randn(experts, n, k, generator=draw) / 16)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    stacks = {}
    for layer in (0, 1, 10):
        name = f"model.layers.{layer}.mlp.experts"
        stacks[f"{name}.gate_up_proj"] = expert_stack(6, 96, 64)
        stacks[f"{name}.down_proj"] = expert_stack(6, 64, 96)
    write_expert_weights(file, stacks)
    return file


@pytest.mark.usefixtures("checkpoint")
class TestWeights:
    def judged(self) -> set[str]:
        return {finding["case"] for finding in verdict()["findings"] if finding["check"] == "interval"}

    def test_the_first_layer_and_four_experts_by_default(self) -> None:
        assert gate("--kernel", "composite", "--weights", "model.safetensors") == 0
        names = ("gate_up_proj", "down_proj")
        assert self.judged() == {f"model.layers.0.mlp.experts.{n}, experts 0–3 of 6" for n in names}
        assert "layer 0 of 3" in verdict()["run"]["suite"]
        assert "up to 4 experts each" in verdict()["run"]["suite"]

    def test_layers_and_experts_are_chosen(self) -> None:
        choice = ("--layers", "1,10", "--experts", "all", "--case", "*down_proj*")
        assert gate("--kernel", "composite", "--weights", ".", *choice) == 0
        assert self.judged() == {f"model.layers.{n}.mlp.experts.down_proj, experts 0–5 of 6" for n in (1, 10)}

    def test_a_planted_mistake_is_seen_on_real_weights(self) -> None:
        options = ("--weights", "model.safetensors", "--case", "*_proj*")
        assert gate("--kernel", "planted:scale_off_by_one", *options) == 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--layers", "2-9"), "layers 0, 1, 10; not 2"),
            (("--layers", "x"), "numbers and ranges"),
            (("--layers", "3-1"), "numbers and ranges"),
            (("--experts", "0"), "positive number"),
        ],
    )
    def test_wrong_choices(self, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert gate("--weights", "model.safetensors", *options) == 2
        assert message in capsys.readouterr().err


def broken(kind: str, checkpoint: Path) -> None:
    whole = checkpoint.read_bytes()
    target = Path("broken.safetensors")
    if kind == "empty":
        target.write_bytes(b"")
    elif kind == "truncated":
        target.write_bytes(whole[: len(whole) // 2])
    elif kind == "pickle":
        torch.save({"model.layers.0.mlp.experts.down_proj_blocks": torch.zeros(2)}, target)
    elif kind == "text":
        target.write_text("<html>404 not found</html>")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "no checkpoint at"),
        ("empty", "is empty"),
        ("truncated", "is truncated"),
        ("pickle", "is a pickle"),
        ("text", "no safetensors file"),
    ],
)
def test_files_that_are_no_checkpoint(
    kind: str, message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(kind, checkpoint)
    assert gate("--weights", "broken.safetensors") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


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
