"""A starting point is written, is right, and says what is in its way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mxref.verification.candidates.loading import load
from mxref.verification.cases.case import Case
from mxref.verification.cases.scope import Scope
from mxref.verification.cli import main
from mxref.verification.gate.plan import plan
from mxref.verification.gate.run import run_gate


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_written_passes() -> None:
    assert main(["new-kernel", "mine.py"]) == 0
    assert "mine.py:layer" in Path("test_mine.py").read_text()
    assert "my_kernel" not in Path("mine.py").read_text()
    candidate = load("mine.py:layer")
    scope = Scope("quick", "cpu", interpreted=False)
    every = plan(scope, own=False)
    awkward = [i for i in every if isinstance(i.case, Case) and (i.case.tokens == 0 or i.case.call.autocast != "off")]
    items = [item for item in every if item.fits(["integer, *", "poison", "second backward"])] + awkward[:12]
    result = run_gate(candidate, items, torch.device("cpu"), suite="some", seed=0)
    assert [str(finding) for finding in result.findings if not finding.ok] == []
    assert result.declined == []


def test_nothing_is_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text("mine")
    assert main(["new-kernel", "mine.py"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert Path("mine.py").read_text() == "mine"
    Path("test_other.py").touch()
    assert main(["new-kernel", "other.py"]) == 2
    assert not Path("other.py").exists(), "half of it is not written either"
    assert main(["new-kernel", "no-module.txt"]) == 2


PLUGIN = ("-p", "no:cacheprovider", "-q")
LAYER = """
import mxref

def right(**operands):
    return mxref.parallel_linear_lora(**operands)

def wrong(**operands):
    return 2 * mxref.parallel_linear_lora(**operands)
"""


@pytest.mark.parametrize(("name", "outcomes"), [("right", {"passed": 1}), ("wrong", {"failed": 1})])
def test_the_plugin_gives_a_test_a_judgement(name: str, outcomes: dict[str, int], pytester: pytest.Pytester) -> None:
    pytester.makepyfile(layers=LAYER)
    options = ("--mxref-kernel", f"layers.py:{name}", "--mxref-device", "cpu", "--mxref-case", "integer, no LoRA")
    result = pytester.runpytest_subprocess(*PLUGIN, *options)
    result.assert_outcomes(**outcomes)
    if name == "wrong":
        result.stdout.fnmatch_lines(["*every element; ratio 2^1*", "*--rerun*"])


def test_the_plugin_stays_away_without_its_option(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_own(): pass")
    pytester.runpytest_subprocess(*PLUGIN).assert_outcomes(passed=1)
