"""A scoreboard as plain data, as Markdown, and in a terminal."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from mxref.verification.checks.finding import Finding, Status
from mxref.verification.report.output import new_table, write_json
from mxref.verification.report.own.markdown import markdown_table
from mxref.verification.studies.scoreboard.run import Board, Row

SCHEMA = "mxref.scoreboard/3"
_SIGN = {Status.FAIL: "✗", Status.WEAK: "≈", Status.WORSE: "↓", Status.NOT_COVERED: "–", Status.PASS: "✓"}
_STYLE = {"✗": "red", "≈": "yellow", "↓": "yellow", "–": "bright_black", "✓": "green"}


def as_json(board: Board) -> dict[str, Any]:
    """Counts of every implementation and check; the first failure of each check and tensor, with how many there are."""
    checks = board.checks()
    return {
        "schema": SCHEMA,
        "device": board.device,
        "suite": board.suite,
        "seed": board.seed,
        "only": list(board.only),
        "started": board.started,
        "rows": [
            {
                "name": row.name,
                "about": row.about,
                "package": row.package,
                "unavailable": row.unavailable or None,
                "covers": row.covers,
                "rounding_points": list(row.points),
                "accumulation": str(row.result.accumulation) if row.result else "",
                "left_out": row.result.left_out if row.result else "",
                "seconds": round(row.result.seconds, 1) if row.result else 0.0,
                "counts": {check: {str(status): row.counts(check)[status] for status in Status} for check in checks},
                "failures": [_failure(failure, count) for failure, count in row.first_failures()],
            }
            for row in board.rows
        ],
    }


def _failure(failure: Finding, count: int) -> dict[str, Any]:
    """Without the traceback, which holds paths of the machine and lines of other projects' sources."""
    return replace(failure, trace="").as_json() | {"count": count}


def as_markdown(board: Board) -> str:
    """The table, what its signs mean, and the first counterexample of each failure."""
    cells = [[check, *(cell_text(row, check) for row in board.rows)] for check in board.checks()]
    lines = [
        *markdown_table(["check", *map(_title, board.rows)], cells, left=1 + len(board.rows)),
        "",
        "✓ judgements that agree with the contract · ≈ only within the order-free bound · ✗ that contradict it · "
        "– declined; where nothing stands, nothing is within what it covers. A judgement is one tensor of one case.",
        "",
        f"{board.device}; {board.suite} suite{_only(board)}, seed {board.seed}, {board.started}.",
    ]
    for row in board.rows:
        lines += _failures_markdown(row, board)
    return "\n".join(lines) + "\n"


def print_board(board: Board, console: Console) -> None:
    """The table and the first counterexamples."""
    table = new_table("check")
    table.columns[0].no_wrap, table.collapse_padding = True, True
    for row in board.rows:
        table.add_column(Text.assemble((row.name, "bold"), f"\n{_release(row)}"))
    for check in board.checks():
        table.add_row(check, *(_coloured(cell_text(row, check)) for row in board.rows))
    console.print(table)
    for row in board.rows:
        for said in _terms(row):
            console.print(Text(f"{row.name}: {said}"))
        for failure, count in row.first_failures():
            console.print(Text.assemble((f"✗ {row.name} ", "red"), _headline(failure, count)))
            for line in _details(failure):
                console.print(Text(f"    {line}"))


def write(board: Board, folder: Path) -> tuple[Path, Path]:
    """Write scoreboard.json and scoreboard.md; the paths, in this order.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / "scoreboard.json", folder / "scoreboard.md"
    write_json(data, as_json(board))
    page.write_text(as_markdown(board), encoding="utf-8")
    return data, page


def cell_text(row: Row, check: str) -> str:
    """One cell: counts by status, the worst first, or why there are none."""
    if row.unavailable:
        return row.unavailable
    counts = row.counts(check)
    return " ".join(f"{sign} {counts[status]}" for status, sign in _SIGN.items() if counts[status])


def _only(board: Board) -> str:
    return f", cases matching {' or '.join(board.only)}" if board.only else ""


def _title(row: Row) -> str:
    """A column's heading: the name, what it is, and what it comes from."""
    about = f"**{row.name}**" + (f"<br>{row.about}" if row.about else "")
    return about + (f"<br>{row.package}" if row.package else "")


def _release(row: Row) -> str:
    """The package and its version; the version alone where the package is called as the row is."""
    package, _, version = row.package.partition(" ")
    return version if package.startswith(row.name) or row.name.startswith(package) else row.package


def _coloured(cell: str) -> Text:
    """A cell in which each sign stays with its number, so that columns can be narrow."""
    words = Text()
    style = "bright_black"
    for word in cell.split():
        style = _STYLE.get(word, style)
        words.append(word if word in _STYLE else f"{word} ", style=style)
    words.rstrip()
    return words


def _failures_markdown(row: Row, board: Board) -> list[str]:
    """An implementation's section: how it is judged, and where it first contradicts the contract."""
    firsts, left_out = row.first_failures(), row.result.left_out if row.result else ""
    reasons = Counter(finding.reason for finding in row.findings if finding.status is Status.NOT_COVERED)
    terms = _terms(row)
    if not firsts and not reasons and not left_out and not terms:
        return []
    lines = ["", f"### {row.name}", ""]
    for said in terms:
        lines += [f"{said[0].upper()}{said[1:]}.", ""]
    lines += [f"- – {count} not covered: {reason}" for reason, count in reasons.items()]
    for failure, count in firsts:
        lines.append(f"- ✗ {_headline(failure, count)}")
        lines += [f"  <br>{line}" for line in _details(failure)]
    return [*lines, *([f"- {left_out}"] if left_out else [])]


def _terms(row: Row) -> list[str]:
    """What an implementation is judged by where that is not the contract, or not over the whole domain."""
    own = f"judged by its own rounding points: {', '.join(row.points)}"
    part = f"asked within what it covers: {row.covers}"
    return [*([part] if row.covers else []), *([own] if row.points else [])]


def _headline(finding: Finding, count: int) -> str:
    others = f" (and {count - 1} more of {finding.check} · {finding.tensor})" if count > 1 else ""
    return f"{finding.check} · {finding.case} · {finding.tensor}: {finding.reason}{others}"


def _details(finding: Finding) -> list[str]:
    """Input bytes, got, expected."""
    example = finding.counterexample
    if example is None:
        return []
    where = ", ".join(map(str, example.coordinate))
    accepted = f", accepted [{example.low:.9g}, {example.high:.9g}]" if example.low != example.high else ""
    got = f"{finding.tensor}[{where}]: got {example.got:.9g}, expected {example.expected:.9g}{accepted}"
    return [*(f"input {weight}" for weight in finding.weights), got]
