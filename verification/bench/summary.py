"""A benchmark in brief, from its record: what the README includes. A ratio is a time over a time: less is faster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mxref.verification.report.own.markdown import markdown_table

BEYOND = "the operands and the results"
"""What a benchmark's extra memory leaves out."""

_CAPTURED = (
    "Eager is how transformers' Trainer, PEFT and TRL run a step unless told otherwise; a graph is captured where "
    "shapes stay the same and the caller asks for it, by `torch.cuda.graph` or "
    '`torch.compile(mode="reduce-overhead")`.'
)

Row = Mapping[str, Any]
Rows = Mapping[tuple[str, str, str], Row]
"""Rows of a record by measure, shape and path."""


def summary(entry: Mapping[str, Any]) -> list[str]:
    """Markdown, by lines: the run, tables of whole steps, of base products and of single ones, and `once`."""
    rows = {(row["measure"], row["shape"], row["path"]): row for row in entry["rows"]}
    v, ceilings = entry["versions"], entry["ceilings"]
    lines = [
        f"{entry['started'][:10]}, {entry['device']}, torch {v['torch']}, triton {v['triton']}, CUDA {v['cuda']}, "
        f"driver {v['driver']}, kernels `{entry['digest'][:12]}`. In the same run: bf16 matmul "
        f"{ceilings['matmul_flops'] / 1e12:.0f} TFLOP/s, copy {ceilings['copy_bytes'] / 1e12:.2f} TB/s.",
    ]
    ours = "repacked" if any(path == "repacked" for _, _, path in rows) else "automatic"
    lines += _eager_beside_graph(rows, ours)
    lines += _every_way(rows, "step", "Whole step: forward, dX, dA, dB")
    lines += _every_way(rows, "base", "Base products alone: forward, dX")
    lines += _single_products(rows, ours)
    told = remarks(entry)
    return [*lines, "", " ".join(told)] if told else lines


def remarks(entry: Mapping[str, Any]) -> list[str]:
    """A sentence each on the peers, on the first call and on the memory of the step on the dense shape, if known."""
    told = [f"{name}: {about}." for name, about in entry.get("peers", {}).items()]
    if entry["first_call_seconds"] is not None:
        seconds = f"{entry['first_call_seconds']:.1f} s"
        told.append(f"First training step of a fresh process, every kernel still to be compiled: {seconds}.")
    known = {
        row["path"]: f"{row['extra_bytes'] / 1e6:,.0f} MB"
        for row in entry["rows"]
        if (row["measure"], row["shape"], row["status"]) == ("step", "dense", "ok") and row["extra_bytes"] is not None
    }
    said = ", ".join(f"{path} {known[path]}" for path in ("automatic", "composite") if path in known)
    return [*told, f"Extra memory of the dense shape's step, beyond {BEYOND}: {said}."] if said else told


def _eager_beside_graph(rows: Rows, ours: str) -> list[str]:
    """A line a shape: the step as most trainers run it, launch by launch, beside the same step as a CUDA graph.

    `ours`: the way that is ours, the layout that the loaders choose on that GPU.
    """
    shapes = _unique(shape for m, shape, path in rows if (m, path) == ("step", ours))
    cells = []
    for shape in shapes:
        sides = [rows.get(("step", shape, path)) for path in ("composite", ours)]
        timed = [row for row in sides if row is not None and row["status"] == "ok"]
        if len(timed) == len(sides):
            times = [milliseconds_and_ratio([row[how] for row in timed]) for how in ("eager", "median")]
            cells.append([shape, *times[0], *times[1]])
            cells[-1][-1] += eager_mark(timed[1])
    if not cells:
        return []
    about = " (repacked, as the loaders lay weights out on this GPU)" if ours == "repacked" else ""
    title = f"**Whole step, eager and as a CUDA graph**, in ms: the composite, ours{about}, ours over the composite's"
    both = ("composite", "ours", "ratio")
    columns = ["shape", *(f"{how}: {what}" for how in ("eager", "graph") for what in both)]
    return ["", title, "", *markdown_table(columns, cells), "", _CAPTURED]


def milliseconds_and_ratio(seconds: Sequence[float]) -> list[str]:
    """Cells: the composite's time and ours, in ms, and ours over the composite's."""
    composite, ours = seconds
    return [f"{composite * 1e3:.2f}", f"{ours * 1e3:.2f}", f"{ours / composite:.2f}"]


SUSTAINED = (
    "shape", "product", "composite: ms", "GHz", "W", "ours: ms", "GHz", "W", "ratio",
)  # fmt: skip
"""Columns of `sustained_cells`."""


def sustained_cells(found: Iterable[Row]) -> list[list[str]]:
    """A line a shape and product: the composite's time, clock and power, ours, and ours over the composite's time.

    Ours is the layout that the loaders choose on that GPU.
    """
    rows = {(row["shape"], row["measure"], row["path"]): row for row in found}
    cells = []
    for shape, measure in dict.fromkeys(key[:2] for key in rows):
        other = rows[shape, measure, "composite"]
        own = rows.get((shape, measure, "repacked")) or rows[shape, measure, "automatic"]
        figures = [
            cell
            for row in (other, own)
            for cell in (f"{row['seconds'] * 1e3:.3f}", f"{row['megahertz'] / 1e3:.2f}", f"{row['watts']:.0f}")
        ]
        cells.append([shape, measure.removeprefix("base "), *figures, f"{own['seconds'] / other['seconds']:.2f}"])
    return cells


def _every_way(rows: Rows, measure: str, title: str) -> list[str]:
    """A line a shape, a column a way: time over the composite's, and over the limit."""
    paths = _unique(path for m, _, path in rows if m == measure and path != "composite")
    shapes = _unique(shape for m, shape, path in rows if m == measure and path == "composite")
    rows_of = [
        [shape, _composite(rows[measure, shape, "composite"]), *(_ratios(rows.get((measure, shape, p))) for p in paths)]
        for shape in shapes
    ]
    heading = ["", f"**{title}**; time over the composite's (over the limit)", ""]
    return [*heading, *markdown_table(["shape", "composite, ms", *paths], rows_of)]


def _single_products(rows: Rows, ours: str) -> list[str]:
    """A line a shape: the forward product and dX over the best of others, decoding over a copy; and over the limit."""
    others = _unique(
        path for (m, _, path), row in rows.items() if m == "base dX" and not row["ours"] and path != "composite"
    )
    if not others:
        return []
    title = (
        f"**Single base products**; {ours}'s time over the best of {' and '.join(others)} (over the limit). "
        "**Decoding** the active experts; over a copy of as many bytes (over the limit)"
    )
    cells = []
    for shape in _unique(shape for m, shape, _ in rows if m == "base dX"):
        products = [
            _over_best(rows.get((m, shape, ours)), [rows.get((m, shape, path)) for path in others])
            for m in ("base forward", "base dX")
        ]
        cells.append([shape, *products, _ratios(rows.get(("decode", shape, "dequantize_experts")))])
    return ["", title, "", *markdown_table(["shape", "forward", "dX", "decoding"], cells)]


def _composite(row: Row) -> str:
    return f"{row['median'] * 1e3:.3f} ({row['limit_ratio']:.2f})" if row["status"] == "ok" else row["status"]


def _ratios(row: Row | None) -> str:
    if row is None:
        return "–"
    return f"{row['ratio']:.2f} ({row['limit_ratio']:.2f}){eager_mark(row)}" if row["status"] == "ok" else row["status"]


def _over_best(row: Row | None, others: Sequence[Row | None]) -> str:
    """Both are known by their ratios to the composite, each from rounds of its own."""
    timed = [other for other in others if other is not None and other["status"] == "ok"]
    if row is None or row["status"] != "ok" or not timed:
        return _ratios(row) if timed else "–"
    best = min(timed, key=lambda other: float(other["ratio"]))
    return _ratios({**row, "ratio": row["ratio"] / best["ratio"]})


def eager_mark(row: Row) -> str:
    """A raised e where the times are not those of CUDA graphs."""
    return "ᵉ" if row["mode"] == "eager" else ""


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
