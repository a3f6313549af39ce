"""A benchmark as JSON, as Markdown for the README, and in a terminal. A ratio is a time over a time: less is faster."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mxref.verification.bench.benchmark import Bench
from mxref.verification.bench.racing import AGREEMENT, Row
from mxref.verification.bench.summary import eager_mark, markdown_line, once, summary
from mxref.verification.cli.options import EVIDENCE
from mxref.verification.records import evidence

__all__ = ["as_json", "as_markdown", "print_bench", "readme_block", "record", "update_readme"]

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
"""What stands between them in the README is generated."""

BEYOND = "the operands and the results"
"""What a benchmark's extra memory leaves out; the first ones named nothing, and left out the operands alone."""


def as_json(bench: Bench) -> dict[str, Any]:
    """Everything that was measured but the single samples, which pytest-benchmark's own file keeps."""
    return {
        "passed": bench.exit_code == 0,
        "started": bench.started,
        "seconds": round(bench.seconds, 1),
        "commit": bench.commit,
        "device": bench.device,
        "gate": [
            {"candidate": g.candidate.name, "verdict": str(g.verdict), "findings": len(g.findings)} for g in bench.gates
        ],
        "rounds": bench.effort.rounds,
        "ceilings": {
            "matmul_flops": bench.ceilings.matmul,
            "copy_bytes": bench.ceilings.copy,
            "drift": round(bench.drift, 4),
        },
        "agreement": AGREEMENT,
        "first_call_seconds": None if bench.first_call is None else _digits(bench.first_call),
        "extra_beyond": BEYOND,
        "rows": [_row_json(row) for row in bench.rows],
    }


def _row_json(row: Row) -> dict[str, Any]:
    names = ("shape", "measure", "path", "reference", "ours", "rows_per_expert", "status")
    named = {name: getattr(row, name) for name in names}
    if not row.ok:
        return named
    rounds = [sorted(samples)[len(samples) // 2] for samples in row.samples]
    return named | {
        "mode": row.mode,
        "median": _digits(row.median),
        "spread": _digits(row.spread),
        "ratio": _digits(row.ratio),
        "ratio_rounds": [_digits(ratio) for ratio in row.ratios],
        "limit": _digits(row.limit),
        "limit_ratio": _digits(row.limit_ratio),
        "limit_ratio_rounds": [_digits(seconds / row.limit) for seconds in rounds],
        "samples": sum(map(len, row.samples)),
        "eager": _digits(row.eager),
        "eager_ratio": _digits(row.eager_ratio),
        "rows_per_s": _digits(row.rows_per_s),
        "flops_per_s": _digits(row.flops_per_s),
        "bytes_per_s": _digits(row.bytes_per_s),
        "extra_bytes": row.extra_bytes,
    }


def record(bench: Bench, root: Path) -> Path:
    """Keep a benchmark as evidence: `bench.json`, `bench.md`, and a copy under `history/`; the first one's path.

    Raises:
        ValueError: the benchmark has not passed; its gate is red or one of our ways failed.
        RuntimeError, OSError: see `evidence.record`.
    """
    if bench.exit_code:
        raise ValueError("a benchmark that has not passed is no evidence")
    path = evidence.record(root, "bench", as_json(bench))
    entry = evidence.load(path)
    path.with_suffix(".md").write_text(as_markdown(entry), encoding="utf-8")
    kept = path.parent / "history" / f"{bench.started.replace(':', '')}-{entry['digest'][:8]}.json"
    kept.parent.mkdir(exist_ok=True)
    kept.write_bytes(path.read_bytes())
    return path


def as_markdown(entry: Mapping[str, Any]) -> str:
    """One record in full: the summary that the README includes, then a table a measure."""
    lines = [f"# Speed on {entry['gpu']}", "", *summary(entry), ""]
    for measure, rows in _by_measure(entry).items():
        lines += [f"## {measure}", "", markdown_line(_columns(rows)), markdown_line(["---"] * 2 + ["---:"] * 9)]
        lines += [markdown_line(_cells(row)) for row in rows] + [""]
    lines.append(
        "Medians of device time: of CUDA graphs where both sides can be captured, eager where marked ᵉ. IQR is the "
        "interquartile range over the median. TFLOP/s count useful operations; TB/s count each active weight in the "
        "form that is read, each input and each output once. Extra memory is the peak beyond "
        f"{entry.get('extra_beyond', 'the operands, results included')}."
    )
    return "\n".join(lines) + "\n"


def _by_measure(data: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in data["rows"]:
        rows.setdefault(row["measure"], []).append(row)
    return rows


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    beside = rows[0].get("reference", "composite")
    figures = ("IQR", f"÷ {beside}", "÷ limit", "eager, ms", "Mrow/s", "TFLOP/s", "TB/s", "extra, MB")
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


def readme_block(root: Path = EVIDENCE) -> str:
    """What the README says about speed: every GPU's summary, between the markers; from the records alone."""
    parts = []
    for path in sorted(root.glob("*/bench.json")):
        full = f"verification/evidence/{path.parent.name}/bench.md"
        parts += ["", *summary(evidence.load(path)), "", f"Every figure: [bench.md]({full})."]
    return "\n".join([BEGIN, *(parts or ["", "No GPU has been measured yet."]), "", END])


def update_readme(readme: Path, root: Path = EVIDENCE) -> bool:
    """Put the block into a README; whether it has the markers."""
    text = readme.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        return False
    readme.write_text(head + readme_block(root) + tail, encoding="utf-8")
    return True


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
    for sentence in once(data):
        console.print(sentence, highlight=False)


def _table(measure: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=measure, title_justify="left", box=SIMPLE_HEAD, header_style="bright_black")
    for i, name in enumerate(_columns(rows)):
        table.add_column(name, justify="left" if i < 2 else "right", no_wrap=i == 1)
    previous = None
    for row in rows:
        if previous not in (None, row["shape"]):
            table.add_section()
        first, *cells = _cells(row)
        style = "bold" if row["path"] == "automatic" else "" if row["ours"] else "bright_black"
        table.add_row(first if first != previous else "", *cells, style=style)
        previous = row["shape"]
    return table


def dumps(bench: Bench) -> str:
    """The JSON text of a benchmark that is no evidence."""
    return json.dumps(as_json(bench), indent=1, allow_nan=False) + "\n"


def _digits(x: float) -> float:
    """Six significant digits: more is noise."""
    return float(f"{x:.6g}")
