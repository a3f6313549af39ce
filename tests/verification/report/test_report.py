"""Reports: strict JSON, one page that needs nothing but itself, and text that names the element."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mxref.verification.arithmetic.accumulation import ACCUMULATIONS
from mxref.verification.candidates.shipped import golden
from mxref.verification.checks.finding import Counterexample, DriftMap, ErrorSample, Finding, Status
from mxref.verification.checks.registry import why
from mxref.verification.gate.result import GateResult
from mxref.verification.report import plots, plots_drift, terminal
from mxref.verification.report.output import FOOTNOTE, share_text
from mxref.verification.report.page import as_html, failures, headline, write


def errors(tensor: str, scale: float = 1.0) -> ErrorSample:
    draw = np.random.default_rng(0)
    magnitude = np.exp(draw.normal(0, 3, 500))
    bound = magnitude * 1e-5
    error = bound * draw.uniform(-0.5, 0.5, 500) * scale
    error[:50] = 0
    return ErrorSample("small", tensor, magnitude, error, bound, error / magnitude * 2**23)


def drift(case: str, tensor: str, largest: float, experts: int = 3, tiles: int = 2) -> DriftMap:
    z = np.random.default_rng(1).normal(0, 1, (experts + 1, tiles + 1))
    z[0, 0], z[1, 1] = np.nan, largest
    rows = [*(f"expert {e}" for e in range(experts)), "all experts"]
    columns = [*(f"columns {64 * c}–{64 * c + 63}" for c in range(tiles)), "all columns"]
    return DriftMap(case, tensor, rows, columns, z, 5.25, {0: 900, -30: 2, 1: 7})


PASSED = Finding("interval", "small", "Y", Status.PASS, "inside", 96, 0, 1.5, 0.4, 0.25, picture=errors("Y"))
FAILED = Finding(
    "interval", "wide <case>", "dX", Status.FAIL, "3 of 64 outside", 64, 3, math.inf, 2.0, 7.5,
    Counterexample((4, 17), math.nan, 1.25, 1.2, 1.3, "NaN where the reference is a number"),
    picture=errors("dX", 40.0), id="0badcafe", problem={"E": 3, "K": 64, "dtype": "bfloat16", "biases": "yes"},
    patterns=("column 63 of 64 only",), trace='File "mine.py", line 7, in layer',
)  # fmt: skip
WEAK = replace(PASSED, tensor="dA", status=Status.WEAK, reason="order-free only", picture=None)
DECLINED = Finding("integer", "gates", "all", Status.NOT_COVERED, "no gates here", 0, 0)
DRIFTED = Finding(
    "drift", "wide <case>", "dX", Status.FAIL, "LoRA's term is scaled by 1.01", 64, 0, bound_share=3.5,
    details={"slopes": 36, "critical z": 5.25, "not judged: ratio std": 0.0123, "not judged: y": "pass"},
    picture=drift("wide <case>", "dX", 18.4),
)  # fmt: skip
STEADY = Finding("drift", "small", "Y", Status.PASS, "no drift", 96, 0, picture=drift("small", "Y", -4.5))
EXACT = Finding("decode", "every finite element, float32", "Y", Status.PASS, "equal", 4096, 0, 0.0, 0.0, 0.0)
ALL = (PASSED, FAILED, WEAK, DECLINED, EXACT, STEADY)
MAPS = [STEADY.picture, DRIFTED.picture]


def result_of(*findings: Finding, name: str = "candidate", strict: bool = False) -> GateResult:
    candidate = replace(golden(), name=name, declared_points=("z-unrounded",))
    how = ACCUMULATIONS["fp32-blocks-64"]
    result = GateResult(candidate, how, "some device", "quick", 7, strict, list(findings), "today", 1.5)
    result.command = "mxref gate --kernel candidate"
    return result


def test_json_is_strict_and_complete(tmp_path: Path) -> None:
    data_file, _ = write(result_of(*ALL), tmp_path / "new" / "folder")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads(data_file.read_text(encoding="utf-8"), parse_constant=refuse)
    assert data["schema"] == "mxref.gate/3"
    assert (data["verdict"], data["exit_code"]) == ("fail", 1)
    assert data["counts"] == {"pass": 3, "fail": 1, "weak pass": 1, "worse than baseline": 0, "not covered": 1}
    assert data["candidate"] == {
        "name": "candidate",
        "rounding_points": ["z-unrounded"],
        "accumulation": "fp32-blocks-64",
        "accumulation_declared": False,
        "covers": "",
    }
    assert data["run"]["device"] == "some device"
    assert data["run"]["seed"] == 7
    assert {"mxref", "torch", "python"} <= set(data["run"]["versions"])
    failed = next(finding for finding in data["findings"] if finding["status"] == "fail")
    assert failed["max_ulp"] == "inf"
    assert failed["counterexample"]["got"] == "nan"
    assert failed["counterexample"]["coordinate"] == [4, 17]
    assert (failed["problem"]["K"], failed["trace"]) == (64, 'File "mine.py", line 7, in layer')
    assert failed["patterns"] == ["column 63 of 64 only"]
    assert [cause["again"] for cause in data["causes"]] == ["mxref gate --kernel candidate --rerun 0badcafe"]
    assert data["checks"] == why()


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    _, page = write(result_of(*ALL), tmp_path)
    html = page.read_text(encoding="utf-8")
    assert "http" not in html
    assert not re.search(r"<(script|link|iframe|img|object)\b|@import", html)
    for target in re.findall(r"""(?:src|href|url)\s*(?:=|\()\s*["']?([^"')\s>]+)""", html):
        assert target.startswith("#"), target


def test_the_page_says_the_verdict_and_the_element() -> None:
    html = as_html(result_of(*ALL))
    assert '<div class="word">FAIL</div>' in html
    assert html.count("<svg ") == 2 + 2 + 2 + 1 + 1  # a panel a tensor
    assert "[4, 17]" in html
    assert "NaN where the reference is a number" in html
    assert "wide &lt;case&gt;" in html
    for explanation in (why()["decode"], why()["integer"], why()["interval"]):
        assert explanation in html
    assert "z-unrounded" in html
    assert "mxref gate --kernel candidate --rerun 0badcafe" in html
    assert "E=3 K=64, bfloat16, biases" in html
    assert "line 7, in layer" in html
    assert "Farthest outside" in html
    passed = as_html(result_of(PASSED, EXACT))
    assert '<div class="word">PASS</div>' in passed
    assert "What went wrong" not in passed
    assert "Nearest to the limit" in passed
    assert FOOTNOTE not in passed
    assert FOOTNOTE in as_html(result_of(replace(PASSED, max_ulp=2e6)))
    assert "<script>" not in as_html(result_of(PASSED, name="<script>alert(1)</script>"))


def test_failures_come_first() -> None:
    html = as_html(result_of(*ALL, DRIFTED))
    worst = html[html.index("Farthest outside") : html.index("Signed error")]
    assert worst.index("7.5 ×") < worst.index("3.5 ×") < worst.index("25 %")
    assert failures(result_of(DRIFTED, FAILED)) == [FAILED, DRIFTED]


def test_numbers_that_decide_nothing_say_so() -> None:
    html = as_html(result_of(*ALL, DRIFTED))
    numbers = html[html.index("Further numbers") :]
    assert "not judged" in numbers
    for text in (">ratio std<", ">0.0123<", ">pass<", ">critical z<", ">5.25<"):
        assert text in numbers
    assert "Further numbers" not in as_html(result_of(*ALL))


def test_drift_maps_show_failing_ones_alone_and_number_their_strata() -> None:
    both = plots_drift.drift_maps(MAPS)
    assert "small, |z| up to 4.5" in both
    assert "wide &lt;case&gt;, |z| up to 18.4" in both
    alone = plots_drift.drift_maps(MAPS, {("small", "Y")})
    assert "18.4" not in alone
    assert ">−4.5<" in alone
    assert "nan" not in alone.lower()


def test_drift_maps_of_awkward_sizes() -> None:
    assert plots_drift.drift_maps([]) == plots_drift.log2_ratios([]) == ""
    unfitted = replace(MAPS[0], z=np.full((4, 3), np.nan), log2_ratio={})
    assert plots_drift.drift_maps([unfitted]) == plots_drift.log2_ratios([unfitted]) == ""
    model = plots_drift.drift_maps([drift("a model", "Y", 1e6, experts=256, tiles=90)])
    assert len(model) < 1_500_000
    assert ">all<" in model
    assert ">expert<" in model
    assert "|z| up to 1e6" in model


def test_powers_of_two_count_what_is_off() -> None:
    text = plots_drift.log2_ratios(MAPS)
    assert text.count("9 of 909 beside 0") == 2
    assert ">≤ −9<" in text  # 2^-30 is counted at the end
    assert "all at 0" in plots_drift.log2_ratios([replace(MAPS[0], log2_ratio={0: 12})])


def test_the_distribution_counts_what_is_beyond() -> None:
    sample = errors("dX", 40.0)
    beyond = int((np.abs(sample.error) > sample.bound).sum())
    assert 0 < beyond < 500
    assert f"{beyond} of 500 beyond" in plots.share_of_bound([sample])
    assert "the largest used 50 %" in plots.share_of_bound([errors("Y")])


def test_the_pictures_share_a_page() -> None:
    samples = [errors("Y"), errors("dX", 40.0)]
    both = plots.ulp_histogram(samples) + plots.error_against_bound(samples) + plots.share_of_bound(samples)
    both += plots_drift.drift_maps(MAPS) + plots_drift.log2_ratios(MAPS)
    ids = re.findall(r'\bid="([^"]+)"', both)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', both)) <= set(ids)
    assert "var(--series)" in both
    assert not re.search(r"#0\d0\d0\d", both)  # no placeholder colour is left


@pytest.mark.parametrize("draw", [plots.ulp_histogram, plots.error_against_bound, plots.share_of_bound])
def test_pictures_of_awkward_data(draw: object) -> None:
    assert callable(draw)
    assert draw([]) == ""
    nothing = np.empty(0)
    assert draw([ErrorSample("c", "Y", nothing, nothing, nothing, nothing)]) == ""
    zero, one = np.zeros(3), np.ones(3)
    assert "<svg" in draw([ErrorSample("c", "Y", one, zero, zero, zero)])
    assert "<svg" in draw([ErrorSample("c", "Z", one, one * np.inf, one, one * np.nan)])
    assert "<svg" in draw([ErrorSample("c", "Y", one, one * 1e300, one * 1e-300, one * 1e300)])


@pytest.mark.parametrize("verbose", [False, True])
def test_the_terminal_names_case_tensor_and_element(verbose: bool) -> None:
    console = Console(file=io.StringIO(), width=140)
    terminal.print_result(result_of(*ALL), console, verbose=verbose)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert ("line 7, in layer" in text) == verbose
    for expected in (
        "--rerun 0badcafe",
        "E=3 K=64, bfloat16, biases",
        "wide <case>",
        "dX[4, 17]",
        "nan",
        "1.25",
        "[1.2, 1.3]",
        "no gates here",
        "FAIL",
        "some device",
    ):
        assert expected in text
    if verbose:
        assert text.index("✗ fail") < text.index("✓ pass")


@pytest.mark.parametrize(
    ("findings", "strict", "expected"),
    [
        ((PASSED, EXACT), False, "All 2 judgements of 4,192 elements agree with the contract."),
        ((PASSED, DECLINED), False, "candidate passes what it covers: 50 %."),
        ((PASSED, WEAK), True, "Under --strict that is a failure"),
        ((PASSED, WEAK), False, "hold only against the order-free bound"),
        ((PASSED, FAILED), False, "1 of 2 judgements contradict the contract, in 1 case."),
        ((DECLINED,), False, "covers none of what it was asked"),
    ],
)
def test_headline(findings: tuple[Finding, ...], strict: bool, expected: str) -> None:
    assert expected in headline(result_of(*findings, strict=strict))


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.0, "exact"), (0.004, "< 1 %"), (0.5, "50 %"), (1.0, "100 %"), (2.5, "2.5 ×"), (math.inf, "∞ ×")],
)
def test_share_text(value: float | None, text: str) -> None:
    assert share_text(value) == text
