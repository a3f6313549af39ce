"""The table: isolation of its processes, counterexamples with their input bytes, and what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from rich.console import Console

from mxref.verification.arithmetic.accumulation import ACCUMULATIONS
from mxref.verification.candidates import known
from mxref.verification.candidates.known import IMPLEMENTATIONS, implementation
from mxref.verification.cases.subset import parse_subset
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.cli import UsageError, main, options
from mxref.verification.cli.own import scoreboard as command
from mxref.verification.cli.own.scoreboard import recorded_rows
from mxref.verification.gate.result import GateResult
from mxref.verification.records.record import read
from mxref.verification.records.record import write as write_record
from mxref.verification.studies.scoreboard.report import (
    as_json,
    as_markdown,
    joined,
    print_board,
    write,
)
from mxref.verification.studies.scoreboard.run import Board, Row, empty_board, run_scoreboard

BROKEN = """
    import os
    import mxref
    from mxref import MXWeights

    def dies_on_gates(gates=None, **operands):
        if gates is not None:
            os._exit(3)
        return mxref.parallel_linear_lora(gates=gates, **operands)

    def takes_byte_0_for_zero(expert_weights, **operands):
        w = expert_weights
        packed = w.packed.clone()
        packed[(w.scales == 0).repeat_interleave(16, 2)] = 0
        return mxref.parallel_linear_lora(expert_weights=MXWeights(packed, w.scales, w.K, w.N), **operands)
"""


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    """Two broken implementations and one that nobody has, judged by two integer fixtures and the exhaustive decode."""
    source = tmp_path_factory.mktemp("broken") / "broken.py"
    source.write_text(dedent(BROKEN))
    names = [f"{source}:dies_on_gates", f"{source}:takes_byte_0_for_zero", "axolotl"]
    only = ["every finite element, float3?", "integer, gates", "integer, k 8"]
    board = empty_board(torch.device("cpu"), full=False, seed=0, only=only)
    run_scoreboard(board, names, torch.device("cpu"), processes=2)
    return board


def test_a_process_that_dies_costs_one_item(board: Board) -> None:
    row = board.rows[0]
    (failure,) = row.failures
    assert (failure["case"], failure["count"]) == ("integer, gates", 1)
    assert failure["reason"] == "its process ended itself with exit status 3"
    assert row.counts["integer"][Status.PASS] > 0, "the items after the loss ran in a new process"


def test_a_checkout_that_nobody_installed_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "version_of", lambda package: "")
    assert {name for name in IMPLEMENTATIONS if implementation(name).installed} == {"mxref.kernels", "golden"}


def test_a_counterexample_names_code_and_scale_byte(board: Board) -> None:
    row = board.rows[1]
    first = row.failures[0]
    assert first["check"] == "decode"
    assert first["counterexample"] is not None
    (weight,) = first["weights"]
    assert "scale byte 0x00" in weight
    assert row.counts["integer"][Status.PASS] > 0


def test_what_is_not_there_says_so(board: Board) -> None:
    assert board.rows[2].unavailable in ("not installed", "needs cuda")
    assert not board.rows[2].counts


def test_files(board: Board, tmp_path: Path) -> None:
    data, page = write(board, tmp_path)
    assert json.loads(data.read_text()) == as_json(board)
    text = page.read_text()
    assert text == as_markdown(board)
    assert "| decode | " in text
    assert "| integer | " in text
    assert "scale byte 0x00" in text
    assert "got 0, expected" in text
    assert "its process ended itself with exit status 3" in text


def test_a_record_holds_no_tracebacks() -> None:
    failure = Finding("decode", "a case", "all", Status.FAIL, "raised", 1, 1, trace='File "/mine/layer.py", line 7')
    (kept,) = _row("golden", [failure]).failures
    assert (kept["reason"], kept["trace"]) == ("raised", "")


def test_entries() -> None:
    assert next(iter(IMPLEMENTATIONS)) == "mxref.kernels"
    assert implementation("golden").make(torch.device("cpu")).name == "golden"
    assert implementation("json:dumps").make(torch.device("cpu")).call is json.dumps
    with pytest.raises(ValueError, match=r"'axolotll' is unknown; expected shipped, mxref\.kernels, axolotl"):
        implementation("axolotll")


def _row(name: str, findings: list[Finding], covers: str = "") -> Row:
    candidate = replace(implementation("golden").make(torch.device("cpu")), covers=parse_subset(covers))
    row = Row(name, implementation(name).about, f"{implementation(name).package} 2026.10.9")
    row.fill(GateResult(candidate, ACCUMULATIONS["undeclared"], "NVIDIA H200", "quick", 0, findings=findings))
    return row


@pytest.fixture
def wide() -> Board:
    """Every column that the table has by default, two of which cover a part."""
    counts = {Status.FAIL: 183, Status.WEAK: 6, Status.PASS: 214}
    findings = [
        finding
        for check in ("decode", "second backward")
        for status, count in counts.items()
        for finding in [Finding(check, "case", "Y", status, "wrong", 1, 0)] * count
    ]
    parts = dict.fromkeys(("humming", "unsloth"), "dtype=bf16, gates=none")
    names = [name for name in IMPLEMENTATIONS if name != "golden"]
    return Board("NVIDIA H200", "quick", 0, rows=[_row(name, findings, parts.get(name, "")) for name in names])


def test_the_whole_table_fits_a_terminal(wide: Board) -> None:
    console = Console(width=120, file=StringIO(), color_system=None)
    print_board(wide, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    names = [name for name in IMPLEMENTATIONS if name != "golden"]
    assert len(names) == 7
    assert all(name in "".join(lines[:6]) for name in names)
    for check in ("decode", "second backward"):
        (line,) = [line for line in lines if line.strip().startswith(check)]
        assert line.count("✗183 ≈6 ✓214") == 7, "each cell is on one line, each sign beside its number"
    assert "…" not in "".join(lines)


def test_a_part_of_the_domain_is_named_beside_its_counts(wide: Board) -> None:
    console = Console(width=120, file=StringIO(), color_system=None)
    print_board(wide, console)
    assert "humming: asked within what it covers: dtype=bf16, gates=none" in console.file.getvalue()  # type: ignore[attr-defined]
    assert as_markdown(wide).count("Asked within what it covers: dtype=bf16, gates=none.") == 2
    assert {row["name"]: row["covers"] for row in as_json(wide)["rows"]}["unsloth"] == "dtype=bf16, gates=none"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--candidates", "nobody"], "'nobody' is unknown"),
        (["--case", "no such case", "--device", "cpu"], "matches no case"),
        (["--device", "cpu", "--record"], "--record keeps what a GPU is asked"),
    ],
)
def test_wrong_use(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["scoreboard", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_line_of_a_recorded_table_is_made_again(wide: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    path = write_record("scoreboard", as_json(wide), torch.device("cuda"), tmp_path)
    assert read(path)["kind"] == "scoreboard"
    passed = _row("humming", [Finding("decode", "case", "Y", Status.PASS, "", 1, 0)])
    after = joined(replace(wide, rows=[passed]), recorded_rows(wide, path))
    assert [row.name for row in after.rows] == [row.name for row in wide.rows]
    assert [row for row in after.rows if row.name != "humming"] == [row for row in wide.rows if row.name != "humming"]
    assert passed in after.rows


def test_lines_that_others_record_meanwhile_are_kept(
    wide: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(board: Board, *_: object, **__: object) -> None:
        write_record("scoreboard", as_json(wide), torch.device("cuda"), tmp_path)  # by another process
        board.rows.append(_row("peft", [Finding("decode", "case", "Y", Status.PASS, "", 1, 0)]))

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(options, "choose_device", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(command, "empty_board", lambda *_, **__: replace(wide, rows=[]))
    monkeypatch.setattr(command, "_judge", judge)
    assert main(["scoreboard", "--candidates", "peft", "--record", str(tmp_path), "--out", str(tmp_path)]) == 0
    (record,) = tmp_path.glob("*/scoreboard.json")
    assert {row["name"] for row in read(record)["rows"]} == {"peft", *(row.name for row in wide.rows)}


def test_lines_that_were_asked_otherwise_are_not_joined(
    wide: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    assert recorded_rows(wide, tmp_path / "none.json") == []
    path = write_record("scoreboard", as_json(wide), torch.device("cuda"), tmp_path)
    with pytest.raises(UsageError, match="has another asked; record the whole table"):
        recorded_rows(replace(wide, asked="other cases"), path)
