"""A gate's result as text in a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mxref.verification.checks.finding import Finding, Status
from mxref.verification.gate.problem import problem_text
from mxref.verification.gate.result import GateResult
from mxref.verification.report.causes import Cause, causes
from mxref.verification.report.output import FOOTNOTE, many_ulp, new_table, share_text, tensor_order, ulp_text
from mxref.verification.report.page import facts, headline

_TITLE = 80
"""Letters of a title; what a pass is about stands in the sentence below in full."""
_SHOWN = 6
"""Causes printed in full."""
_STYLE = {
    Status.FAIL: ("✗", "red"),
    Status.WEAK: ("≈", "yellow"),
    Status.WORSE: ("↓", "yellow"),
    Status.NOT_COVERED: ("–", "bright_black"),
    Status.PASS: ("✓", "green"),
}
"""Sign and colour of a status, the most urgent first."""


def print_result(result: GateResult, console: Console, verbose: bool = False) -> None:
    """Failures in detail, the findings by check and tensor (`verbose`: one by one), and the verdict last."""
    console.print(_every_finding(result.findings) if verbose else _by_check_and_tensor(result.findings))
    if any(many_ulp(finding) for finding in result.findings):
        console.print(Text(f"{FOOTNOTE}\n", style="bright_black"))
    found = causes(result.findings, result.why)
    for cause in found[:_SHOWN]:
        console.print(_failure(cause, result.command, verbose))
    if len(found) > _SHOWN:
        console.print(f"[red]{len(found) - _SHOWN} further causes are in the report.[/]\n")
    for status in (Status.WEAK, Status.WORSE, Status.NOT_COVERED):
        reasons = Counter(finding.reason for finding in result.findings if finding.status is status)
        for reason, count in reasons.items():
            console.print(Text.assemble((f"{status}, {count} ×: ", _STYLE[status][1]), reason))
    for fault in result.faults:
        console.print(Text.assemble(("not the candidate's fault: ", "red"), fault))
    about = Table.grid(padding=(0, 2))
    for name, value in facts(result):
        about.add_row(Text(name, style="bright_black"), Text(value))
    passed = result.exit_code == 0
    colour = "red" if not passed else _STYLE[result.verdict][1]
    short = result.title if len(result.title) <= _TITLE else f"{result.word} (a part only)"
    title = f"[bold {colour}] {escape(short)} [/]"
    console.print(Panel(Group(Text(headline(result), style="bold"), "", about), title=title, border_style=colour))


def _by_check_and_tensor(findings: Iterable[Finding]) -> RenderableType:
    """One row a check and tensor: numbers of cases and elements, the worst of each number."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.check, finding.tensor), []).append(finding)
    table = new_table("check", "tensor", ">cases", ">elements", ">max ULP", "bound used", "verdict")
    previous = None
    checks = list(dict.fromkeys(check for check, _ in groups))
    for check, tensor in sorted(groups, key=lambda key: (checks.index(key[0]), tensor_order(key[1]))):
        members = groups[check, tensor]
        if previous not in (None, check):
            table.add_section()
        counts = Counter(finding.status for finding in members)
        verdict = Text("  ").join(
            Text(f"{_STYLE[status][0]} {counts[status]} {status}", style=_STYLE[status][1])
            for status in _STYLE
            if counts[status]
        )
        table.add_row(
            check if check != previous else "",
            tensor,
            str(len(members)),
            f"{sum(finding.elements for finding in members):,}",
            ulp_text(_largest(finding.max_ulp for finding in members)) + max(map(many_ulp, members)),
            _bar(_largest(finding.bound_share for finding in members)),
            verdict,
        )
        previous = check
    return table


def _every_finding(findings: Iterable[Finding]) -> RenderableType:
    table = new_table("verdict", "check", "case", "tensor", ">elements", ">max ULP", "bound used")
    for finding in sorted(findings, key=lambda finding: list(_STYLE).index(finding.status)):
        sign, colour = _STYLE[finding.status]
        table.add_row(
            Text(f"{sign} {finding.status}", style=colour),
            finding.check,
            escape(finding.case),
            finding.tensor,
            f"{finding.elements:,}",
            ulp_text(finding.max_ulp) + many_ulp(finding),
            _bar(finding.bound_share),
        )
    return table


def _failure(cause: Cause, command: str, verbose: bool) -> RenderableType:
    """One cause, and how to ask again; `verbose`: with the candidate's traceback."""
    finding, rows = cause.naming, Table.grid(padding=(0, 2))

    def row(name: str, value: str, style: str = "") -> None:
        rows.add_row(Text(name, style="bright_black"), Text(value, style=style))

    row("why", finding.reason)
    example = finding.counterexample
    if example is not None:
        row("first at", f"{finding.tensor}[{', '.join(map(str, example.coordinate))}]")
        row("got", f"{example.got:.9g}", "red")
        row("expected", f"{example.expected:.9g}", "green")
        row("accepted", "exactly this" if example.low == example.high else f"[{example.low:.9g}, {example.high:.9g}]")
        if example.note:
            row("note", example.note)
        for weight in finding.weights:
            row("input", weight)
    if finding.problem:
        row("problem", problem_text(finding.problem))
    if cause.common:
        row("in common", problem_text(cause.common))
    if cause.others:
        cases = cause.cases
        names = "; ".join(cases[:3]) + (f"; and {len(cases) - 3} more" if len(cases) > 3 else "")
        seen = sorted({f"{other.check} {other.tensor}" for other in cause.others})
        row("also", f"{len(cause.others)} findings ({', '.join(seen[:6])}{', …' if len(seen) > 6 else ''})")
        if names:
            row("also in", names)
    if finding.id and command:
        row("again", f"{command} --rerun {finding.id}")
    if verbose and finding.trace:
        row("trace", finding.trace)
    title = f"[red]✗[/] {finding.check} · {escape(finding.case)} · [bold]{finding.tensor}[/]"
    return Panel(rows, title=title, title_align="left", border_style="red", expand=False)


def _bar(share: float | None, width: int = 10) -> Text:
    """A share as a bar and a number; red beyond 1."""
    if not share:
        return Text(share_text(share), style="bright_black")
    if not share <= 1:
        return Text(f"{'█' * width} {share_text(share)}", style="red")
    filled = round(share * width)
    return Text.assemble(("█" * filled, "blue"), ("░" * (width - filled), "bright_black"), f" {share_text(share)}")


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
