"""Products that need a GPU, through stand-ins: what they get, and that nothing around them goes wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from foreign_packages import on_path, write_humming, write_unsloth
from judging import ask

from mxref.verification.candidates.elsewhere import packed_products
from mxref.verification.candidates.known import implementation
from mxref.verification.cases.case import Case
from mxref.verification.cases.draw import draw
from mxref.verification.cases.scope import Scope
from mxref.verification.checks.finding import Status
from mxref.verification.gate.plan import plan
from mxref.verification.gate.run import run_gate

CPU = torch.device("cpu")
BEHAVIOUR = ("determinism", "poison", "unmutated", "rows", "second backward")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    write_humming(tmp_path)
    write_unsloth(tmp_path)
    yield from on_path(tmp_path, monkeypatch)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    ("name", "backward", "version"), [("humming", False, "0.1.19"), ("unsloth", True, "2026.10.9")]
)
def test_an_honest_product_passes_within_what_it_covers(name: str, backward: bool, version: str) -> None:
    """Both orders of rows on either side, and every routing without sentinels, exactly; and its behaviour."""
    assert implementation(name).version() == version
    candidate = implementation(name).make(CPU)
    scope = Scope("quick", "cpu", 0, interpreted=False, subset=candidate.covers)
    asked = [item for item in plan(scope, own=False) if item.checks[0].name in ("integer", *BEHAVIOUR)]
    items = [item for item in asked if isinstance(item.case, Case) and item.case.experts < 9 and item.case.rows < 200]
    result = run_gate(candidate, items, CPU, suite="quick", seed=0)
    assert not [str(finding) for finding in result.findings if not finding.ok]
    judged = {finding.check for finding in result.findings if finding.status is Status.PASS}
    assert judged >= {"integer", *BEHAVIOUR} - (set() if backward else {"second backward"})
    cases = [item.case for item in items if isinstance(item.case, Case)]
    assert len(cases) > 15
    assert {case.grouped_in for case in cases} == {case.grouped_out for case in cases} == {False, True}
    assert {case.k for case in cases} >= {1, 2}
    assert any(finding.tensor == "dX" for finding in result.findings) is backward


@pytest.mark.usefixtures("packages")
def test_dX_sums_a_token_s_slots_before_it_rounds() -> None:
    case = Case("slots", 4, 64, 96, 40, 8, 0, torch.bfloat16, data="balanced")
    findings = ask("interval", implementation("unsloth").make(CPU), draw(case))
    assert {finding.tensor for finding in findings} == {"Y", "dX"}
    assert not [str(finding) for finding in findings if not finding.ok]


@pytest.mark.parametrize(("name", "package"), [("humming", "humming"), ("unsloth", "unsloth_zoo")])
def test_what_is_not_there_says_so(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed_products.load_unsloth.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=package):
        implementation(name).make(CPU)
