"""A gate's result as JSON and as a self-contained HTML page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2

from mxref.verification.checks.finding import DriftMap, Finding, Status
from mxref.verification.checks.registry import DRIFT
from mxref.verification.gate.problem import problem_text
from mxref.verification.gate.result import GateResult
from mxref.verification.report import plots, plots_drift
from mxref.verification.report.causes import Cause, causes
from mxref.verification.report.output import (
    FOOTNOTE,
    detail_text,
    many_ulp,
    plural,
    share_text,
    tensor_order,
    ulp_text,
    write_json,
)

SCHEMA = "mxref.gate/3"
_SHOWN, _WORST, _A_CHECK = 30, 12, 4
_NOT_JUDGED = "not judged: "
_BADGE = {
    Status.PASS: ("✓", "pass"),
    Status.FAIL: ("✗", "fail"),
    Status.WEAK: ("≈", "weak"),
    Status.WORSE: ("↓", "weak"),
    Status.NOT_COVERED: ("–", "none"),
}
"""Sign and CSS class of a status."""


def headline(result: GateResult) -> str:
    """The verdict, and what was not asked, a sentence each."""
    return " ".join(filter(None, [_verdict(result), result.left_out]))


def _verdict(result: GateResult) -> str:
    name, counts, total = result.candidate.name, result.counts(), len(result.findings)
    if counts[Status.FAIL]:
        cases = len({f.case for f in result.findings if f.status is Status.FAIL})
        return (
            f"{counts[Status.FAIL]} of {total} judgements contradict the contract, in {cases} {plural(cases, 'case')}."
        )
    if result.faults:
        count = len(result.faults)
        return (
            f"No verdict: {count} {plural(count, 'item')} could not be judged for faults that are not the candidate's."
        )
    if not result.covered:
        return f"{name} covers none of what it was asked, so nothing speaks for it."
    if result.declined:
        return (
            f"{name} passes what it covers: {math.floor(100 * result.covered)} %. What it does not support it declined "
            "without having declared it (--covers)."
        )
    within = f", within {result.qualification}" if result.qualification else ""
    strict = " Under --strict that is a failure." if result.exit_code else ""
    elements = sum(finding.elements for finding in result.findings if finding.status is not Status.NOT_COVERED)
    if counts[Status.WEAK]:
        return (
            f"Nothing contradicts the contract, but {counts[Status.WEAK]} of {total} judgements hold only against the "
            f"order-free bound, because no accumulation is declared{within}.{strict}"
        )
    if counts[Status.WORSE]:
        return (
            f"Nothing contradicts the contract, but {counts[Status.WORSE]} of {total} judgements are worse than the "
            f"accepted baseline{within}.{strict}"
        )
    return f"All {counts[Status.PASS]} judgements of {elements:,} elements agree with the contract{within}.{strict}"


def as_json(result: GateResult) -> dict[str, Any]:
    """The result as plain data; numbers that JSON lacks become "nan", "inf" and "-inf"."""
    counts = result.counts()
    return {
        "schema": SCHEMA,
        "verdict": str(result.verdict),
        "exit_code": result.exit_code,
        "faults": result.faults,
        "covered": round(result.covered, 4),
        "only": result.qualification,
        "headline": headline(result),
        "counts": {str(status): counts[status] for status in Status},
        "candidate": {
            "name": result.candidate.name,
            "rounding_points": list(result.candidate.declared_points),
            "accumulation": str(result.accumulation),
            "accumulation_declared": result.candidate.accumulation is not None,
            "covers": str(result.candidate.covers),
        },
        "run": {
            "device": result.device,
            "suite": result.suite,
            "seed": result.seed,
            "strict": result.strict,
            "started": result.started,
            "seconds": round(result.seconds, 2),
            "versions": result.versions,
        },
        "checks": dict(result.why),
        "causes": [_cause_json(cause, result.command) for cause in causes(result.findings, result.why)],
        "drift": [_map_json(drift) for drift in result.maps],
        "findings": [finding.as_json() for finding in result.findings],
    }


def as_html(result: GateResult) -> str:
    """A self-contained page, readable in light and dark."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mxref.verification.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(ulp=ulp_text, many=many_ulp, share=share_text, sign=lambda status: _BADGE[status][0])
    environment.filters["problem"] = problem_text
    environment.filters.update(detail=detail_text, bare=lambda name: name.removeprefix(_NOT_JUDGED))
    environment.filters["css"] = lambda status: _BADGE[status][1]
    failed, found = failures(result), causes(result.findings, result.why)
    drifted = {(f.case, f.tensor) for f in failed if f.check == DRIFT.name}
    return environment.get_template("gate.html").render(
        result=result,
        verdict=result.verdict,
        headline=headline(result),
        counts=[(status, result.counts()[status]) for status in Status],
        facts=facts(result),
        checks=result.why,
        matrices=_matrices(result.findings),
        causes=found[:_SHOWN],
        more_causes=max(0, len(found) - _SHOWN),
        failures=failed,
        worst=_worst(result.findings),
        histogram=plots.ulp_histogram(result.samples),
        cloud=plots.error_against_bound(result.samples),
        distribution=plots.share_of_bound(result.samples),
        heat=plots_drift.drift_maps(result.maps, drifted),
        drifted=len(drifted),
        limit=max((drift.critical for drift in result.maps), default=0.0),
        octaves=plots_drift.log2_ratios(result.maps),
        footnote=FOOTNOTE,
        numbers=_numbers(result.findings),
        Status=Status,
    )


def write(result: GateResult, folder: Path) -> tuple[Path, Path]:
    """Write gate.json and gate.html; the paths, in this order.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / "gate.json", folder / "gate.html"
    write_json(data, as_json(result))
    page.write_text(as_html(result), encoding="utf-8")
    return data, page


def failures(result: GateResult) -> list[Finding]:
    """Failed findings, the farthest outside first."""
    failed = [finding for finding in result.findings if finding.status is Status.FAIL]

    def distance(finding: Finding) -> float:
        """How far outside; infinite where nothing could be measured, just outside for a wrong sign."""
        unusable = finding.violations == finding.elements
        return finding.bound_share or (math.inf if unusable else 1.0)

    return sorted(failed, key=distance, reverse=True)


def facts(result: GateResult) -> list[tuple[str, str]]:
    """What was judged, where, by what."""
    candidate = result.candidate
    points = ", ".join(candidate.declared_points) or "the contract's own"
    accumulation = str(result.accumulation)
    if not result.accumulation.declared:
        accumulation += ": the order-free bound, a weak one"
    else:
        accumulation += " (not declared; this device's default)" if candidate.accumulation is None else " (declared)"
    return [
        ("candidate", candidate.name),
        ("device", result.device),
        *(result.declares or (("rounding points", points), ("accumulation", accumulation))),
        ("covers", str(candidate.covers) or "everything"),
        ("suite", f"{result.suite}, seed {result.seed}" + (", strict" if result.strict else "")),
        ("versions", ", ".join(f"{name} {version}" for name, version in result.versions.items())),
        ("run", f"{result.started}, {result.seconds:.1f} s"),
    ]


def _cause_json(cause: Cause, command: str) -> dict[str, Any]:
    again = f"{command} --rerun {cause.naming.id}" if command and cause.naming.id else ""
    told = {"naming": cause.naming.as_json(), "common": cause.common, "again": again}
    return told | {"others": len(cause.others), "cases": cause.cases}


def _matrices(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """For each check a table of cases against tensors."""
    by_check: dict[str, dict[str, dict[str, Finding]]] = {}
    for finding in findings:
        by_check.setdefault(finding.check, {}).setdefault(finding.case, {})[finding.tensor] = finding
    matrices = []
    for check, cases in by_check.items():
        tensors = {tensor for row in cases.values() for tensor in row}
        matrices.append({"check": check, "tensors": sorted(tensors, key=tensor_order), "cases": cases})
    return matrices


def _worst(findings: Iterable[Finding]) -> list[Finding]:
    """The judgements that used most of their bound; failures first, few of any check."""
    measured = [f for f in findings if f.bound_share is not None and f.status is not Status.NOT_COVERED]
    measured.sort(key=lambda f: (f.status is not Status.FAIL, -(f.bound_share or 0.0)))
    taken: Counter[str] = Counter()
    worst = []
    for finding in measured:
        taken[finding.check] += 1
        if taken[finding.check] <= _A_CHECK:
            worst.append(finding)
    return worst[:_WORST]


def _numbers(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """For each check a table of its findings' details."""
    by_check: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.details:
            by_check.setdefault(finding.check, []).append(finding)
    tables = []
    for check, rows in by_check.items():
        names = list(dict.fromkeys(name for finding in rows for name in finding.details))
        own = [name for name in names if not name.startswith(_NOT_JUDGED)]
        reported = [name for name in names if name.startswith(_NOT_JUDGED)]
        tables.append({"check": check, "own": own, "reported": reported, "rows": rows})
    return tables


def _map_json(drift: DriftMap) -> dict[str, Any]:
    """A drift map as plain data; null where a stratum was not fitted."""
    z = [[None if math.isnan(value) else round(value, 3) for value in row] for row in drift.z.tolist()]
    counts = {str(octave): count for octave, count in drift.log2_ratio.items()}
    return vars(drift) | {"z": z, "log2_ratio": counts}
