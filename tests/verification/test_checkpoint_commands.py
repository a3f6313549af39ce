"""The gate judges on the experts of every convention, and says what it cannot read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from expert_checkpoints import MAKERS

from mxref.verification.cli import main


@pytest.mark.parametrize("convention", MAKERS)
def test_the_gate_judges_every_projection(convention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, stacks = MAKERS[convention](tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    options = ("--layers", "all", "--experts", "2", "--case", "*_proj*", "--out", "report")
    assert main(["gate", "--kernel", "composite", "--weights", "checkpoint", *options]) == 0
    (written,) = (tmp_path / "report").glob("*.json")
    findings = json.loads(written.read_text())["findings"]
    judged = {finding["case"] for finding in findings if finding["check"] != "state"}  # of the whole run
    assert judged == {f"{name}, experts 0–1 of 3" for name in stacks}


@pytest.mark.parametrize("command", [["inspect"], ["gate", "--weights"]])
def test_a_damaged_checkpoint_is_a_wrong_use(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MAKERS["Kimi-K3"](tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[" * 10_000 + "]" * 10_000)
    assert main([*command, str(tmp_path)]) == 2
    assert "is nested too deeply" in capsys.readouterr().err
