"""A benchmark as JSON, as Markdown for the README, and in a terminal. A ratio is a time over a time: less is faster."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mxref.verification import evidence
from mxref.verification.benchmark import Bench
from mxref.verification.options import EVIDENCE
from mxref.verification.racing import AGREEMENT, Row

__all__ = ["as_json", "as_markdown", "print_bench", "readme_block", "record", "update_readme"]

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
"""What stands between them in the README is generated."""

_COLUMNS = (
    "shape", "way", "median, ms", "IQR", "÷ composite", "÷ limit", "eager, ms", "Mrow/s", "TFLOP/s", "TB/s", "extra, MB"
)  # fmt: skip


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
        "rows": [_row_json(row) for row in bench.rows],
    }


def _row_json(row: Row) -> dict[str, Any]:
    named = {name: getattr(row, name) for name in ("shape", "measure", "path", "ours", "rows_per_expert", "status")}
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
    lines = [f"# Speed on {entry['gpu']}", "", *_summary(entry), ""]
    for measure in dict.fromkeys(row["measure"] for row in entry["rows"]):
        lines += [f"## {measure}", "", _markdown_line(_COLUMNS), _markdown_line(["---"] * 2 + ["---:"] * 9)]
        lines += [_markdown_line(_cells(row)) for row in entry["rows"] if row["measure"] == measure] + [""]
    lines.append(
        "Medians of device time: of CUDA graphs where both sides can be captured, eager where marked ᵉ. IQR is the "
        "interquartile range over the median. TFLOP/s count useful operations; TB/s count each active weight in the "
        "form that is read, each input and each output once. Extra memory is the peak beyond the operands, results "
        "included."
    )
    return "\n".join(lines) + "\n"


def _summary(entry: Mapping[str, Any]) -> list[str]:
    """Whole step and base products, a line a shape, a column a way: time over the composite's, and over the limit."""
    rows = {(row["measure"], row["shape"], row["path"]): row for row in entry["rows"]}
    shapes = list(dict.fromkeys(row["shape"] for row in entry["rows"]))
    v, ceilings = entry["versions"], entry["ceilings"]
    lines = [
        f"{entry['started'][:10]}, {entry['gpu']}, torch {v['torch']}, triton {v['triton']}, CUDA {v['cuda']}, driver "
        f"{v['driver']}, kernels `{entry['digest'][:12]}`. In the same run: bf16 matmul "
        f"{ceilings['matmul_flops'] / 1e12:.0f} TFLOP/s, copy {ceilings['copy_bytes'] / 1e12:.2f} TB/s.",
    ]
    for measure, title in (("step", "Whole step: forward, dX, dA, dB"), ("base", "Base products alone: forward, dX")):
        paths = list(dict.fromkeys(path for m, _, path in rows if m == measure and path != "composite"))
        lines += ["", f"**{title}**; time over the composite's (over the limit)", ""]
        lines += [_markdown_line(["shape", "composite, ms", *paths])]
        lines += [_markdown_line(["---", "---:", *["---:"] * len(paths)])]
        for shape in shapes:
            composite = rows.get((measure, shape, "composite"))
            if composite is not None:
                cells = [_ratios(rows.get((measure, shape, path))) for path in paths]
                lines.append(_markdown_line([shape, _composite(composite), *cells]))
    return lines


def _composite(row: Mapping[str, Any]) -> str:
    return f"{row['median'] * 1e3:.3f} ({row['limit_ratio']:.2f})" if row["status"] == "ok" else row["status"]


def _ratios(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    return f"{row['ratio']:.2f} ({row['limit_ratio']:.2f}){_mark(row)}" if row["status"] == "ok" else row["status"]


def _mark(row: Mapping[str, Any]) -> str:
    return "ᵉ" if row["mode"] == "eager" else ""


def _cells(row: Mapping[str, Any]) -> list[str]:
    if row["status"] != "ok":
        return [row["shape"], row["path"], row["status"], *[""] * 8]
    extra = row["extra_bytes"]
    return [
        row["shape"],
        row["path"],
        f"{row['median'] * 1e3:.3f}{_mark(row)}",
        f"{row['spread']:.1%}",
        f"{row['ratio']:.2f}",
        f"{row['limit_ratio']:.2f}",
        f"{row['eager'] * 1e3:.3f}",
        f"{row['rows_per_s'] / 1e6:.1f}",
        f"{row['flops_per_s'] / 1e12:.0f}",
        f"{row['bytes_per_s'] / 1e12:.2f}",
        "" if extra is None else f"{extra / 1e6:,.0f}",
    ]


def readme_block(root: Path = EVIDENCE) -> str:
    """What the README says about speed: every GPU's summary, between the markers; from the records alone."""
    parts = []
    for path in sorted(root.glob("*/bench.json")):
        full = f"verification/evidence/{path.parent.name}/bench.md"
        parts += ["", *_summary(evidence.load(path)), "", f"Every figure: [bench.md]({full})."]
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
    for measure in dict.fromkeys(row["measure"] for row in data["rows"]):
        console.print(_table(measure, [row for row in data["rows"] if row["measure"] == measure]))


def _table(measure: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=measure, title_justify="left", box=SIMPLE_HEAD, header_style="bright_black")
    for i, name in enumerate(_COLUMNS):
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


def _markdown_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _digits(x: float) -> float:
    """Six significant digits: more is noise."""
    return float(f"{x:.6g}")
