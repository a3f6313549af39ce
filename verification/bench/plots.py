"""Three pictures of speed: against the limit, one strategy against the other, and over commits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from mxref.verification.bench.history import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, Any]
"""A kept benchmark, as `records.record.read` gives it."""


def _rows(record: Record, measure: str, path: str) -> list[Mapping[str, Any]]:
    """The rows that have numbers, by rising rows per expert."""
    found = [r for r in record["rows"] if (r["measure"], r["path"], r["status"]) == (measure, path, "ok")]
    return sorted(found, key=lambda row: float(row["rows_per_expert"]))


def roofline(axes: Axes, record: Record, measure: str = "base") -> None:
    """The share of the limit that each way achieves, over rows per active expert; 1 is the roof.

    A dot is a shape; the line goes through their mean where several have as many rows per expert.
    """
    for path in dict.fromkeys(row["path"] for row in record["rows"]):
        shares: dict[float, list[float]] = {}
        for row in _rows(record, measure, path):
            shares.setdefault(row["rows_per_expert"], []).append(1 / row["limit_ratio"])
        if shares:
            (line,) = axes.plot(list(shares), [mean(ys) for ys in shares.values()], linewidth=1.2, label=path)
            for x, ys in shares.items():
                axes.plot([x] * len(ys), ys, "o", markersize=4, color=line.get_color())
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", ylim=(0, 1.05), xlabel="rows per active expert", ylabel="limit / time")
    axes.set_title(f"{measure}: share of the limit", loc="left")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def crossover(axes: Axes, record: Record, measure: str = "step") -> None:
    """Time of A, decode once, over time of B, decode inside; above 1, B is faster."""
    b = {row["shape"]: row for row in _rows(record, measure, "strategy B")}
    pairs = [(row, b[row["shape"]]) for row in _rows(record, measure, "strategy A") if row["shape"] in b]
    for row, other in pairs:
        axes.plot(row["rows_per_expert"], row["median"] / other["median"], "o", label=row["shape"])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", ylim=(0, None), xlabel="rows per active expert", ylabel="time of A / time of B")
    axes.set_title(f"{measure}: decode once (A) against decode inside (B)", loc="left")
    if pairs:
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def over_commits(axes: Axes, entries: Sequence[Run], measure: str = "step", path: str = "automatic") -> None:
    """One way's time over the composite's, run after run, one line a shape; bars span the rounds."""
    shapes = dict.fromkeys(shape for entry in entries for shape, m, p in entry.rows if (m, p) == (measure, path))
    for shape in shapes:
        key = (shape, measure, path)
        points = [
            (i, entry.rows[key])
            for i, entry in enumerate(entries)
            if key in entry.rows and entry.rows[key]["status"] == "ok"
        ]
        x, y = [i for i, _ in points], [row["ratio"] for _, row in points]
        low = [row["ratio"] - row["ratio_low"] for _, row in points]
        high = [row["ratio_high"] - row["ratio"] for _, row in points]
        axes.errorbar(x, y, yerr=(low, high), marker="o", markersize=4, linewidth=1.2, capsize=2, label=shape)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(entries)), [entry.name for entry in entries], rotation=30, ha="right", fontsize=7)
    axes.set(ylabel="time / composite's", ylim=(0, None))
    axes.set_title(f"{path}, {measure}", loc="left")
    if shapes:
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def save_history(entries: Sequence[Run], path: str) -> None:
    """`over_commits` of the whole step and of the base products, as a picture file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, measure in zip(figure.subplots(1, 2), ("step", "base"), strict=True):
        over_commits(axes, entries, measure)
    figure.savefig(path, dpi=130)
