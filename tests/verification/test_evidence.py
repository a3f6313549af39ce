"""Records of GPU runs: they belong to these sources, and they show when they do not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from mxref.kernels.models.sizes import MODELS
from mxref.verification.candidates.shipped import golden
from mxref.verification.cases.scope import Scope
from mxref.verification.cli import main, options
from mxref.verification.clone import EVIDENCE
from mxref.verification.gate.plan import plan
from mxref.verification.gate.run import run_gate
from mxref.verification.records import freshness
from mxref.verification.records import sources as syntax
from mxref.verification.records.freshness import problems, survey
from mxref.verification.records.gate_summary import gate_summary
from mxref.verification.records.kernel_sources import kernel_sources
from mxref.verification.records.readme import README, blocks, filled
from mxref.verification.records.record import KINDS, SCHEMA, folder_name, read, write

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


CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_the_gate_has_seen_these_kernels() -> None:
    """Fails when a kernel, a configuration, a launcher or a container changed after the last gate run on a GPU."""
    found = problems()
    assert not found, "\n".join(found)


def test_the_readme_s_generated_parts_are_current() -> None:
    text = README.read_text(encoding="utf-8")
    assert filled(text, blocks()) == text, "stale; run: mxref evidence --readme"


def test_records_stay_small() -> None:
    assert sum(path.stat().st_size for path in EVIDENCE.rglob("*.json")) < 1_000_000


def test_the_digest_covers_what_decides_a_result() -> None:
    names = kernel_sources().keys()
    assert {
        "kernels/device/decode.py",
        "kernels/device/configs.py",
        "kernels/device/launch.py",
        "kernels/layer/autograd.py",
    } <= names
    assert {"formats.py", "weights.py", "routing.py", "problem.py"} <= names
    assert not any(name.startswith(("kernels/compiled/", "kernels/models/", "verification/")) for name in names)
    assert "scattermoe.py" not in names


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
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")


@pytest.fixture
def records(gpu: None, tmp_path: Path) -> Path:
    for kind in KINDS:
        write(kind, {"passed": True, "seed": 0, "rows": [{"a": 1}, {"b": 2.5}]}, GPU, tmp_path)
    return tmp_path


def test_what_a_record_says_of_itself(records: Path) -> None:
    entry = read(records / "nvidia-h200" / "gate.json")
    assert (entry["schema"], entry["kind"], entry["device"]) == (SCHEMA, "gate", "NVIDIA H200")
    assert entry["command"] == KINDS["gate"].command
    assert {"torch", "triton", "driver", "ptxas", "cuda", "python", "mxref"} <= entry["versions"].keys()
    assert entry["sources"] == syntax.digests(kernel_sources())
    assert entry["rows"] == [{"a": 1, "b": None}, {"a": None, "b": 2.5}]


def test_a_payload_cannot_say_it(gpu: None, tmp_path: Path) -> None:
    path = write("gate", {"device": "another", "digest": "0"}, GPU, tmp_path)
    assert read(path)["device"] == "NVIDIA H200"
    assert read(path)["digest"] == syntax.digest(kernel_sources())


def test_a_page_for_people_is_made_from_the_record(gpu: None, tmp_path: Path) -> None:
    def page(entry: dict[str, Any]) -> str:
        return f"{entry['device']}, {entry['x']}"

    path = write("bench", {"x": 1}, GPU, tmp_path, name="history/one", page=page)
    assert path == tmp_path / "nvidia-h200" / "history" / "one.json"
    assert path.with_suffix(".md").read_text() == "NVIDIA H200, 1"


def test_folders_are_named_after_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert folder_name(GPU) == "nvidia-a100-sxm4-80gb"
    assert folder_name(CPU) == "interpreter-cpu"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].gpu_only])
def test_what_a_gpu_sees_is_not_recorded_elsewhere(kind: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="is what a GPU saw"):
        write(kind, {}, CPU, tmp_path)


def test_fresh_records_are_fine(records: Path) -> None:
    assert problems(records) == []
    states = survey(records)
    assert {state.kind for state in states} == KINDS.keys()
    assert all(state.fresh and not state.moved for state in states)


def changed(name: str = "kernels/device/decode.py") -> dict[str, str]:
    texts = kernel_sources()
    return texts | {name: texts[name] + "\nbyte = 0\n"}


def test_a_changed_kernel_needs_the_gate_and_the_others_are_shown(records: Path) -> None:
    (problem,) = problems(records, changed())
    assert problem.startswith("nvidia-h200/gate.json is older than kernels/device/decode.py; run on a GPU: mxref gate ")
    states = survey(records, changed())
    assert len(states) == len(KINDS)
    assert all(state.changed == ("kernels/device/decode.py",) for state in states)


@pytest.mark.parametrize(("day", "stale"), [("2026-01-01", False), ("2099-01-01", True)])
def test_the_newest_gate_decides(day: str, stale: bool, records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever changes a kernel has one GPU; the records of others stay, and say what they are of."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100")
    monkeypatch.setattr("mxref.verification.records.record.datetime", Mock(now=lambda _: datetime.fromisoformat(day)))
    write("gate", {}, GPU, records, texts={"formats.py": "other = 1"})
    assert [problem.split()[0] for problem in problems(records)] == ["nvidia-a100/gate.json"] * stale
    assert [state.fresh for state in survey(records) if state.kind == "gate"] == [False, True]


def test_a_lost_file_counts(records: Path) -> None:
    texts = kernel_sources()
    del texts["kernels/device/decode.py"]
    assert "kernels/device/decode.py" in problems(records, texts)[0]


def test_other_versions_are_shown(records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = read(records / "nvidia-h200" / "gate.json")["versions"]
    monkeypatch.setattr(freshness, "versions", lambda: here | {"triton": "99.0", "torch": here["torch"] + "+another"})
    assert survey(records)[0].moved == (f"triton {here['triton']} → 99.0",)


def test_a_missing_gate_is_a_problem_and_nothing_else_is(records: Path) -> None:
    (records / "nvidia-h200" / "bench.json").unlink()
    assert not problems(records)
    (records / "nvidia-h200" / "gate.json").unlink()
    (problem,) = problems(records)
    assert "mxref gate --require-gpu --record" in problem


@pytest.mark.parametrize("kind", ["gate", "pytest"])
def test_an_edited_record_is_refused(records: Path, kind: str) -> None:
    path = records / "nvidia-h200" / f"{kind}.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    (problem,) = problems(records)
    assert "was changed by hand" in problem
    with pytest.raises(ValueError, match="was changed by hand"):
        read(path)


@pytest.mark.parametrize(("text", "said"), [("{", "is no JSON"), ("{}", "is no record"), ("[]", "is no record")])
def test_what_is_no_record_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "gate.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        read(tmp_path / "gate.json")


@pytest.mark.parametrize("kind", ["gate", "pytest"])
def test_a_recorded_failure_stays_visible(records: Path, kind: str) -> None:
    write(kind, {"passed": False}, GPU, records)
    (problem,) = problems(records)
    assert "records a failure on NVIDIA H200" in problem


def test_summary_of_a_gate() -> None:
    items = [item for item in plan(Scope("quick", "cpu"), own=False) if item.name in ("integer, k 8", "odd sizes")]
    summary = gate_summary(run_gate(golden(), items, CPU, suite="quick", seed=0))
    assert summary["passed"]
    assert summary["failures"] == []
    assert summary["bound_share"]["integer"]["Y"] == 0.0
    assert summary["max_ulp"].keys() == {"odd sizes"}, "an exact case says nothing beside its check's share"
    json.dumps(summary, allow_nan=False)


class TestCommand:
    """`mxref evidence`."""

    def test_fresh_records(self, records: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["evidence", "--evidence", str(records)]) == 0
        out = capsys.readouterr().out
        assert out.count("fresh") == len(KINDS)
        assert "again:" not in out

    def test_a_stale_record_names_its_command(self, records: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write("bench", {}, GPU, records, texts={"formats.py": "other = 1"})
        assert main(["evidence", "--evidence", str(records)]) == 0
        out = capsys.readouterr().out
        assert "stale: 1 changed" in out
        assert f"again: {KINDS['bench'].command}" in out

    def test_a_stale_gate_fails(self, records: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write("gate", {}, GPU, records, texts={"formats.py": "other = 1"})
        assert main(["evidence", "--evidence", str(records)]) == 1
        assert "gate.json is older than formats.py" in capsys.readouterr().out

    def test_wrong_use(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["evidence", "--evidence", str(tmp_path / "none")]) == 2
        assert "is no folder" in capsys.readouterr().err


def test_generated_parts_stand_between_markers() -> None:
    text = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb"
    assert filled(text, {"x": "new \\1"}) == "a\n<!-- x:begin -->\n\nnew \\1\n\n<!-- x:end -->\nb"
    with pytest.raises(ValueError, match="has no <!-- y:begin -->"):
        filled(text, {"y": ""})


def test_the_readme_s_table_shows_each_record_with_its_date(records: Path) -> None:
    write("pytest", {}, GPU, records, texts={"formats.py": "other = 1"})
    shown = {
        "bench",
        "rows",
        "host",
        "sustained",
        *MODELS,
    } & KINDS.keys()  # whose figures the README shows, which these have not
    for kind in shown:
        (records / "nvidia-h200" / f"{kind}.json").unlink()
    table = blocks(records)["records"].splitlines()
    assert len(table) == 2 + len(KINDS) - len(shown)
    of = {kind: next(line for line in table if KINDS[kind].about in line) for kind in ("gate", "pytest")}
    date = read(records / "nvidia-h200" / "gate.json")["recorded"][:10]
    assert f"| nvidia-h200 | {date} | torch " in of["gate"]
    assert (of["gate"][-7:], of["pytest"][-6:]) == ("| yes |", "| no |")


def test_the_gate_records_what_a_gpu_saw(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gate", "--device", "cpu", "--record"]) == 2
    assert "--record keeps a whole suite" in capsys.readouterr().err


@pytest.mark.parametrize(
    "narrowed", [["--case", "integer"], ["--kernel", "golden"], ["--rerun", "01234567"], ["--fail-fast"]]
)
def test_the_gate_records_whole_suites(
    narrowed: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU too, which is pretended."""
    monkeypatch.setattr(options, "choose_device", lambda *_: GPU)
    monkeypatch.setattr("mxref.verification.cli.gate._judge", lambda *_: pytest.fail("judged"))
    assert main(["gate", "--record", *narrowed]) == 2
    assert "--record keeps a whole suite" in capsys.readouterr().err


def test_pytest_refuses_to_record_a_part() -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-k", "graph", "--record-evidence"]
    done = subprocess.run(command, cwd=root, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "--record-evidence keeps the whole" in done.stderr
