"""A benchmark as plain data, as a page of Markdown, in a terminal. A ratio is a time over a time: less is faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mxref.verification.bench.benchmark import Bench
from mxref.verification.bench.pairs import Row, digits
from mxref.verification.bench.summary import BEYOND, eager_mark, remarks, summary
from mxref.verification.report.output import new_table
from mxref.verification.report.own.markdown import markdown_table

_NAMES = ("shape", "measure", "path", "reference", "ours", "rows_per_expert", "status")
_NUMBERS = (
    "median", "spread", "ratio", "limit", "limit_ratio", "eager", "rows_per_s", "flops_per_s", "bytes_per_s"
)  # fmt: skip


def as_json(bench: Bench) -> dict[str, Any]:
    """Everything that was measured but the single samples; see `samples`."""
    return {
        "passed": bench.exit_code == 0,
        "started": bench.started,
        "seconds": round(bench.seconds, 1),
        "commit": bench.commit,
        "device": bench.device,
        "gate": [
            {"candidate": g.candidate.name, "verdict": str(g.verdict), "findings": len(g.findings)} for g in bench.gates
        ],
        "ceilings": {
            "matmul_flops": bench.ceilings.matmul,
            "copy_bytes": bench.ceilings.copy,
            "drift": round(bench.drift, 4),
        },
        "peers": bench.peers,
        "first_call_seconds": None if bench.first_call is None else digits(bench.first_call),
        "rows": [_row_json(row) for row in bench.rows],
    }


def _row_json(row: Row) -> dict[str, Any]:
    named = {name: getattr(row, name) for name in _NAMES}
    if not row.ok:
        return named
    numbers = {name: digits(getattr(row, name)) for name in _NUMBERS}
    return named | {"mode": row.mode, "extra_bytes": row.extra_bytes} | numbers


def as_markdown(entry: Mapping[str, Any]) -> str:
    """One record in full: the summary that the README includes, then a table a measure."""
    lines = [f"# Speed on {entry['device']}", "", *summary(entry), ""]
    for measure, rows in _by_measure(entry).items():
        lines += [f"## {measure}", "", *markdown_table(_columns(rows), map(_cells, rows), left=2), ""]
    lines.append(
        "Medians of device time: of CUDA graphs where both sides can be captured, eager where marked ᵉ. IQR is the "
        "interquartile range over the median. TFLOP/s count useful operations; TB/s count each active weight in the "
        f"form that is read, each input and each output once. Extra memory is the peak beyond {BEYOND}."
    )
    return "\n".join(lines) + "\n"


def _by_measure(data: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in data["rows"]:
        rows.setdefault(row["measure"], []).append(row)
    return rows


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    figures = ("IQR", f"÷ {rows[0]['reference']}", "÷ limit", "eager, ms", "Mrow/s", "TFLOP/s", "TB/s", "extra, MB")
    return ["shape", "way", "median, ms", *figures]


def _cells(row: Mapping[str, Any]) -> list[str]:
    if row["status"] != "ok":
        return [row["shape"], row["path"], row["status"], *[""] * 8]
    extra = row["extra_bytes"]
    return [
        row["shape"],
        row["path"],
        f"{row['median'] * 1e3:.3f}{eager_mark(row)}",
        f"{row['spread']:.1%}",
        f"{row['ratio']:.2f}",
        f"{row['limit_ratio']:.2f}",
        f"{row['eager'] * 1e3:.3f}",
        f"{row['rows_per_s'] / 1e6:.1f}" if row["rows_per_s"] else "",
        f"{row['flops_per_s'] / 1e12:.0f}" if row["flops_per_s"] else "",
        f"{row['bytes_per_s'] / 1e12:.2f}",
        "" if extra is None else f"{extra / 1e6:,.0f}",
    ]


def print_bench(bench: Bench, console: Console) -> None:
    """The gate's verdict, then a table a measure. On a red gate: what failed, and no speed."""
    if not bench.green:
        for result in bench.gates:
            for finding in result.findings:
                if not finding.ok:
                    console.print(Text(str(finding), style="red"))
        console.print("[bold red]The gate is red: nothing was timed.[/]")
        return
    findings = sum(len(result.findings) for result in bench.gates)
    console.print(f"gate: {findings} findings on our ways, all pass", style="green", highlight=False)
    data = as_json(bench)
    ceilings = data["ceilings"]
    console.print(
        f"ceilings: bf16 matmul {ceilings['matmul_flops'] / 1e12:.0f} TFLOP/s, copy "
        f"{ceilings['copy_bytes'] / 1e12:.2f} TB/s, drift {ceilings['drift']:.1%}",
        highlight=False,
    )
    for measure, rows in _by_measure(data).items():
        console.print(_table(measure, rows))
    for sentence in remarks(data):
        console.print(sentence, highlight=False)


def _table(measure: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    shape, way, *figures = _columns(rows)
    table = new_table(shape, way, *(f">{figure}" for figure in figures), title=measure)
    table.columns[1].no_wrap = True
    previous = None
    for row in rows:
        if previous not in (None, row["shape"]):
            table.add_section()
        first, *cells = _cells(row)
        style = "bold" if row["path"] == "automatic" else "" if row["ours"] else "bright_black"
        table.add_row(first if first != previous else "", *cells, style=style)
        previous = row["shape"]
    return table
