"""Three pictures of speed: against the limit, one strategy against the other, and over commits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mxref.verification.bench.history import Entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["crossover", "over_commits", "roofline", "save_history"]

Record = Mapping[str, Any]
"""A kept benchmark, as `evidence.load` gives it."""


def _rows(record: Record, measure: str, path: str) -> list[Mapping[str, Any]]:
    """The rows that have numbers, by rising rows per expert."""
    found = [r for r in record["rows"] if (r["measure"], r["path"], r["status"]) == (measure, path, "ok")]
    return sorted(found, key=lambda row: float(row["rows_per_expert"]))


def roofline(axes: Axes, record: Record, measure: str = "base") -> None:
    """The share of the limit that each way achieves, over rows per active expert; 1 is the roof."""
    for path in dict.fromkeys(row["path"] for row in record["rows"]):
        rows = _rows(record, measure, path)
        if rows:
            x, y = [r["rows_per_expert"] for r in rows], [1 / r["limit_ratio"] for r in rows]
            axes.plot(x, y, marker="o", markersize=4, linewidth=1.2, label=path)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", ylim=(0, 1.05), xlabel="rows per active expert", ylabel="limit / time")
    axes.set_title(f"{measure}: share of the limit", loc="left")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def crossover(axes: Axes, record: Record, measure: str = "step") -> None:
    """Time of A, decode once, over time of B, decode inside; above 1, B is faster."""
    b = {row["shape"]: row for row in _rows(record, measure, "strategy B")}
    pairs = [(row, b[row["shape"]]) for row in _rows(record, measure, "strategy A") if row["shape"] in b]
    points = [(row["rows_per_expert"], row["median"] / other["median"], row["shape"]) for row, other in pairs]
    for x, y, shape in points:
        axes.plot([x], [y], marker="o", color="tab:blue" if y > 1 else "tab:orange")
        covered = any(x <= other_x < 1.2 * x and other_y > y for other_x, other_y, _ in points)
        offset, turn = ((4, -8), -40) if covered else ((3, 4), 40)  # a point under another has its name below
        axes.annotate(
            shape, (x, y), offset, textcoords="offset points", fontsize=7, rotation=turn, rotation_mode="anchor"
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.margins(x=0.2, y=0.2)
    axes.set(xscale="log", ylim=(0, None), xlabel="rows per active expert", ylabel="time of A / time of B")
    axes.set_title(f"{measure}: decode once (A) against decode inside (B)", loc="left")


def over_commits(axes: Axes, entries: Sequence[Entry], measure: str = "step", path: str = "automatic") -> None:
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
        low = [max(0.0, row["ratio"] - min(row["ratio_rounds"])) for _, row in points]
        high = [max(0.0, max(row["ratio_rounds"]) - row["ratio"]) for _, row in points]
        axes.errorbar(x, y, yerr=(low, high), marker="o", markersize=4, linewidth=1.2, capsize=2, label=shape)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(entries)), [entry.name for entry in entries], rotation=30, ha="right", fontsize=7)
    axes.set(ylabel="time / composite's", ylim=(0, None))
    axes.set_title(f"{path}, {measure}", loc="left")
    if shapes:
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def save_history(entries: Sequence[Entry], path: str) -> None:
    """`over_commits` of the whole step and of the base products, as a picture file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, measure in zip(figure.subplots(1, 2), ("step", "base"), strict=True):
        over_commits(axes, entries, measure)
    figure.savefig(path, dpi=130)
