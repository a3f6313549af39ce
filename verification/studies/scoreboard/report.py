"""A scoreboard as plain data, as Markdown, and in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from mxref.verification.candidates.known import IMPLEMENTATIONS
from mxref.verification.checks.finding import Status
from mxref.verification.report.output import new_table, write_json
from mxref.verification.report.own.markdown import markdown_table
from mxref.verification.studies.scoreboard.run import Board, Row

SCHEMA = "mxref.scoreboard/4"
_SIGN = {Status.FAIL: "✗", Status.WEAK: "≈", Status.WORSE: "↓", Status.NOT_COVERED: "–", Status.PASS: "✓"}
_STYLE = {"✗": "red", "≈": "yellow", "↓": "yellow", "–": "bright_black", "✓": "green"}


def as_json(board: Board) -> dict[str, Any]:
    """The table as plain data."""
    return {"schema": SCHEMA, **asdict(board)}


def joined(board: Board, recorded: Sequence[Row]) -> Board:
    """The table with the rows of others that a record has, in the order in which implementations are known."""
    rows = {row.name: row for row in (*recorded, *board.rows)}
    order = [*IMPLEMENTATIONS, *rows]
    return replace(board, rows=sorted(rows.values(), key=lambda row: order.index(row.name)))


def as_markdown(board: Board) -> str:
    """The table, what its signs mean, and the first counterexample of each failure."""
    cells = [[check, *(cell_text(row, check) for row in board.rows)] for check in board.checks()]
    lines = [
        *markdown_table(["check", *map(_title, board.rows)], cells, left=1 + len(board.rows)),
        "",
        "✓ judgements that agree with the contract · ≈ only within the order-free bound · ✗ that contradict it · "
        "– declined; where nothing stands, nothing is within what it covers. A judgement is one tensor of one case.",
        "",
        f"{board.device}; {board.suite} suite{_only(board)}, seed {board.seed}; {_days(board)}.",
    ]
    for row in board.rows:
        lines += _failures_markdown(row)
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
        for failure in row.failures:
            console.print(Text.assemble((f"✗ {row.name} ", "red"), _headline(failure)))
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
    counts = row.counts.get(check, {})
    return " ".join(f"{sign} {counts[status]}" for status, sign in _SIGN.items() if status in counts)


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


def _days(board: Board) -> str:
    """When it was judged."""
    first, *_, last = sorted(row.started for row in board.rows) * 2
    return first if first == last else f"{first} to {last}"


def _failures_markdown(row: Row) -> list[str]:
    """An implementation's section: how it is judged, and where it first contradicts the contract."""
    terms = _terms(row)
    if not row.failures and not row.declined and not row.left_out and not terms:
        return []
    lines = ["", f"### {row.name}", ""]
    for said in terms:
        lines += [f"{said[0].upper()}{said[1:]}.", ""]
    lines += [f"- – {count} not covered: {reason}" for reason, count in row.declined.items()]
    for failure in row.failures:
        lines.append(f"- ✗ {_headline(failure)}")
        lines += [f"  <br>{line}" for line in _details(failure)]
    return [*lines, *([f"- {row.left_out}"] if row.left_out else [])]


def _terms(row: Row) -> list[str]:
    """What an implementation is judged by where that is not the contract, or not over the whole domain."""
    own = f"judged by its own rounding points: {', '.join(row.rounding_points)}"
    part = f"asked within what it covers: {row.covers}"
    return [*([part] if row.covers else []), *([own] if row.rounding_points else [])]


def _headline(failure: dict[str, Any]) -> str:
    check, tensor, others = failure["check"], failure["tensor"], failure["count"] - 1
    more = f" (and {others} more of {check} · {tensor})" if others else ""
    return f"{check} · {failure['case']} · {tensor}: {failure['reason']}{more}"


def _details(failure: dict[str, Any]) -> list[str]:
    """Input bytes, got, expected."""
    example = failure["counterexample"]
    if example is None:
        return []
    where = ", ".join(map(str, example["coordinate"]))
    got, expected, low, high = (float(example[name]) for name in ("got", "expected", "low", "high"))
    accepted = f", accepted [{low:.9g}, {high:.9g}]" if low != high else ""
    line = f"{failure['tensor']}[{where}]: got {got:.9g}, expected {expected:.9g}{accepted}"
    return [*(f"input {weight}" for weight in failure["weights"]), line]
