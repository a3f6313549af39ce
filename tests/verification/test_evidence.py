"""Records of GPU runs: they belong to these sources, and they show when they do not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mxref.verification.candidates.candidate import golden
from mxref.verification.cli import main
from mxref.verification.cli.options import EVIDENCE
from mxref.verification.gate.run import run_gate, suite_steps
from mxref.verification.records import evidence
from mxref.verification.records import sources as syntax

SOURCE = '''
"""What it is."""
import triton.language as tl

@triton.jit
def kernel(x, BLOCK: tl.constexpr = 16):
    """Doubles x."""
    # a comment
    if x < 0:
        raise ValueError(f"x is {x}; expected more")
    return [2 * y for y in x], f"{x!r:>{BLOCK}}"

class Config:
    BLOCK: int = 16
    """Rows."""
'''
DIGEST = "acf076c92c5b950ad5e7cda05eedf180db3827b228e953af831ba6ce55210ff2"


def test_gpu_evidence_belongs_to_these_kernels() -> None:
    """Fails when a kernel, a configuration, a launcher or a container changed after the last GPU run."""
    problems = evidence.check()
    assert not problems, "\n".join(problems)


def test_every_kind_of_evidence_is_there() -> None:
    """An expected failure, with the commands that end it, while a kind has not been recorded on any GPU."""
    lacking = [command for kind, command in evidence.COMMANDS.items() if not list(EVIDENCE.glob(f"*/{kind}.json"))]
    if lacking:
        pytest.xfail(f"not recorded yet; run on a GPU: {'; '.join(lacking)}")


def test_the_digest_covers_what_decides_a_result() -> None:
    names = evidence.sources()
    assert {
        "kernels/device/decode.py",
        "kernels/device/configs.py",
        "kernels/device/launch.py",
        "kernels/layer/autograd.py",
    } <= names.keys()
    assert {"formats.py", "weights.py", "routing.py", "problem.py", "rounding.py"} <= names.keys()
    assert not {"kernels/aot.py", "kernels/layers.py", "verification/gate.py", "scattermoe.py"} & names.keys()


def test_the_digest_is_the_same_in_every_python() -> None:
    assert syntax.digest({"kernel.py": SOURCE}) == DIGEST


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# a comment", "# another one"),
        ('"""Doubles x."""', '"""Twice x."""'),
        ('"""Rows."""', '"""Rows of a tile."""'),
        ('"""What it is."""', ""),
        ("2 * y", "(2*y)"),
        ("expected more", "expected at least 0"),
    ],
)
def test_what_decides_nothing_leaves_the_digest_alone(old: str, new: str) -> None:
    assert old in SOURCE
    assert syntax.digest({"kernel.py": SOURCE.replace(old, new)}) == syntax.digest({"kernel.py": SOURCE})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2 * y", "2.0 * y"),
        ("2 * y", "y * 2"),
        ("x < 0", "x <= 0"),
        (": tl.constexpr", ""),
        ("= 16", "= 32"),
        ("@triton.jit\n", ""),
        ("ValueError", "TypeError"),
        ("BLOCK: int = 16", "BLOCK: int = 64"),
    ],
)
def test_what_decides_something_changes_it(old: str, new: str) -> None:
    assert old in SOURCE
    assert syntax.digest({"kernel.py": SOURCE.replace(old, new)}) != syntax.digest({"kernel.py": SOURCE})


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_other_pythons_on_this_machine_agree(version: str) -> None:
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode:
        pytest.skip(f"no python{version} here")
    code = "import runpy, sys; print(runpy.run_path(sys.argv[1])['digest']({'kernel.py': sys.stdin.read()}))"
    command = [python, "-c", code, syntax.__file__]
    done = subprocess.run(command, input=SOURCE, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == DIGEST


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a GPU were here, so that records can be written."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")


@pytest.fixture
def records(gpu: None, tmp_path: Path) -> Path:
    for kind in evidence.COMMANDS:
        evidence.record(tmp_path, kind, {"passed": True, "seed": 0})
    return tmp_path


def test_fresh_records_are_fine(records: Path) -> None:
    assert evidence.check(records) == []
    entry = evidence.load(records / "nvidia-h200" / "gate.json")
    assert entry["gpu"] == "NVIDIA H200"
    assert {"torch", "triton", "driver", "ptxas", "cuda", "python", "mxref"} == entry["versions"].keys()


def test_a_changed_kernel_names_file_and_command(records: Path) -> None:
    texts = evidence.sources()
    texts["kernels/device/decode.py"] += "\nbyte = 0\n"
    problems = evidence.check(records, texts)
    assert len(problems) == len(evidence.COMMANDS)
    gate = next(problem for problem in problems if "gate.json" in problem)
    assert gate.startswith("nvidia-h200/gate.json is older than kernels/device/decode.py; run on a GPU: mxref gate ")


def test_a_new_or_a_lost_file_counts(records: Path) -> None:
    texts = evidence.sources()
    assert "kernels/new.py" in evidence.check(records, {**texts, "kernels/new.py": ""})[0]
    del texts["kernels/device/decode.py"]
    assert "kernels/device/decode.py" in evidence.check(records, texts)[0]


def test_missing_records(records: Path) -> None:
    (records / "nvidia-h200" / "pytest.json").unlink()
    assert not evidence.check(records)
    (records / "nvidia-h200" / "bench.json").unlink()
    (problem,) = evidence.check(records)
    assert "mxref bench --record" in problem
    assert evidence.check(records / "nothing here")


def test_an_edited_record_is_refused(records: Path) -> None:
    path = records / "nvidia-h200" / "gate.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    (problem,) = evidence.check(records)
    assert "was changed by hand" in problem


def test_a_recorded_failure_stays_visible(gpu: None, records: Path) -> None:
    evidence.record(records, "gate", {"passed": False})
    (problem,) = evidence.check(records)
    assert "records a failure on NVIDIA H200" in problem


def test_no_evidence_without_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="no CUDA GPU"):
        evidence.record(tmp_path, "gate", {})


def test_summary_of_a_gate() -> None:
    device = torch.device("cpu")
    steps = [step for step in suite_steps(device, False, 0) if step.case in ("integer", "no tokens")]
    summary = evidence.gate_summary(run_gate(golden(), steps, device, suite="quick", seed=0))
    assert summary["passed"]
    assert summary["failures"] == []
    assert summary["max_ulp"]["integer"]["Y"] == 0.0
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize("narrowed", [[], ["--case", "integer"], ["--kernel", "golden"]])
def test_the_gate_records_whole_suites_on_a_gpu_only(narrowed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gate", "--device", "cpu", "--record", *narrowed]) == 2
    assert "--record keeps a whole suite" in capsys.readouterr().err


def test_pytest_refuses_to_record_a_part() -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-k", "graph", "--record-evidence"]
    done = subprocess.run(command, cwd=root, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "--record-evidence keeps the whole" in done.stderr
