"""A baseline is written on request, from a passing run, and tells what has become worse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mxref.verification.checks.finding import Finding, Status
from mxref.verification.records.record import read
from mxref.verification.records.ulp_baseline import Baseline, accept, baseline_findings, baseline_path, environment

CPU = torch.device("cpu")
RUN = [
    Finding("interval", "odd sizes", "Y", Status.PASS, "", 100, 0, max_ulp=0.5, rms_ulp=0.3),
    Finding("interval", "odd sizes", "dX", Status.PASS, "", 100, 0, max_ulp=1.5, rms_ulp=0.4),
    Finding("interval", "balanced", "Y", Status.PASS, "", 100, 0, max_ulp=0.0, rms_ulp=0.0),
    Finding("integer", "integer", "Y", Status.PASS, "", 100, 0, max_ulp=0.0, rms_ulp=0.0),
]


def judged(run: list[Finding], folder: Path, seed: int = 0) -> dict[str, Finding]:
    return {finding.tensor: finding for finding in baseline_findings(run, CPU, seed, folder)}


def test_without_a_baseline_nothing_is_claimed(tmp_path: Path) -> None:
    (finding,) = judged(RUN, tmp_path).values()
    assert finding.status is Status.NOT_COVERED
    assert "--accept-baseline" in finding.reason
    assert baseline_findings([RUN[3]], CPU, 0, tmp_path) == []


def test_cases_that_cover_the_domain_replace_those_of_an_earlier_domain(tmp_path: Path) -> None:
    earlier, later = (replace(RUN[0], case=f"pairs 7 {digits}") for digits in ("8a92", "0c28"))
    accept([*RUN, earlier], CPU, 0, tmp_path)
    for whole, cases in ((False, {earlier.case, later.case}), (True, {later.case})):
        accept([later], CPU, 0, tmp_path, whole=whole)
        kept = Baseline.read(baseline_path(CPU, tmp_path))
        assert kept is not None
        assert kept.errors.keys() == {"odd sizes", "balanced", *cases}


def test_the_same_errors_pass_and_smaller_ones_too(tmp_path: Path) -> None:
    path = accept(RUN, CPU, 0, tmp_path)
    assert path == baseline_path(CPU, tmp_path) == tmp_path / "interpreter-cpu" / "ulp_baseline.json"
    assert {finding.status for finding in judged(RUN, tmp_path).values()} == {Status.PASS}
    better = [replace(RUN[0], max_ulp=0.4), *RUN[1:]]
    assert "smaller in 1" in judged(better, tmp_path)["Y"].reason


@pytest.mark.parametrize("change", [{"max_ulp": 0.5001}, {"rms_ulp": 0.3001}])
def test_worse_is_shown_until_it_is_accepted(change: dict[str, float], tmp_path: Path) -> None:
    accept(RUN, CPU, 0, tmp_path)
    worse = [replace(RUN[0], **change), *RUN[1:]]
    findings = judged(worse, tmp_path)
    assert {tensor: finding.status for tensor, finding in findings.items()} == {"Y": Status.WORSE, "dX": Status.PASS}
    assert "odd sizes" in findings["Y"].reason
    assert findings["Y"].violations == 1
    assert findings["Y"].ok
    accept(worse, CPU, 0, tmp_path)
    assert {finding.status for finding in judged(worse, tmp_path).values()} == {Status.PASS}


def test_a_reference_summed_in_another_order_is_no_worsening(tmp_path: Path) -> None:
    """An honest run whose reference a CPU computed, the baseline's a GPU."""
    was = replace(RUN[0], max_ulp=0.20921395994719205, rms_ulp=0.16839187617373585)
    now = replace(RUN[0], max_ulp=0.20921395994787417, rms_ulp=0.1683918761544588)
    accept([was], CPU, 0, tmp_path)
    assert judged([now], tmp_path)["Y"].status is Status.PASS


def test_another_order_of_summation_makes_it_information(tmp_path: Path) -> None:
    path = accept(RUN, CPU, 0, tmp_path)
    other = {**environment(CPU), "fp32 products": "another"}
    baseline = Baseline.read(path)
    assert baseline is not None
    assert replace(baseline, environment=other).write(CPU, tmp_path) == path
    finding = judged([replace(RUN[0], max_ulp=2.0)], tmp_path)["Y"]
    assert finding.status is Status.PASS
    assert finding.reason.startswith("information only")
    assert "fp32 products another →" in finding.reason


def test_other_draws_are_not_compared_and_new_cases_say_so(tmp_path: Path) -> None:
    accept(RUN[:2], CPU, 0, tmp_path)
    assert judged(RUN, tmp_path, seed=1) == {}
    assert judged(RUN, tmp_path)["new results"].status is Status.NOT_COVERED


def test_accepting_keeps_other_cases_and_refuses_failures(tmp_path: Path) -> None:
    path = accept(RUN, CPU, 0, tmp_path)
    before = Baseline.read(path)
    accept(RUN[:2], CPU, 0, tmp_path)
    assert Baseline.read(path) == before
    with pytest.raises(ValueError, match="only a passing run"):
        accept([*RUN, replace(RUN[0], status=Status.FAIL)], CPU, 0, tmp_path)
    with pytest.raises(ValueError, match="no errors to accept"):
        accept(RUN[3:], CPU, 0, tmp_path)
    accept(RUN[:1], CPU, 1, tmp_path)
    assert set(read(path)["ulp"]) == {"odd sizes"}


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = baseline_path(CPU, tmp_path)
    path.parent.mkdir()
    path.write_text("{}")
    with pytest.raises(ValueError, match="no record of schema"):
        judged(RUN, tmp_path)
    accept(RUN, CPU, 0, tmp_path)
    assert judged(RUN, tmp_path)["Y"].ok
