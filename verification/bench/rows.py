"""Forward and dX of one layer over rows per expert: ours, what others have, and the limit, as rows and as a chart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mxref.verification.bench.workloads import MEASURES, Shape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PRODUCTS", "ROWS", "rows_chart"]

ROWS = tuple(Shape(f"{rows} rows", 256, 2048, 1024, 32 * rows, 8, "balanced") for rows in (2**i for i in range(3, 13)))
"""The layer of the main benchmark's balanced shapes, with 8 to 4096 rows for each of its 256 experts."""

PRODUCTS = tuple(measure for measure in MEASURES if measure.name in ("base forward", "base dX"))
"""What is timed of them."""

_NAMES = {"automatic": "mxref, MXFP4", "repacked": "mxref, MXFP4 repacked", "composite": "torch._grouped_mm, bf16"}
_WIDE = 8.0
"""Inches from which the two panels stand side by side."""


def rows_chart(record: Mapping[str, Any], width: float = 10.0) -> Figure:
    """Time over the limit, which is 1, against rows per expert, on logarithmic axes; a panel a product.

    Args:
        record: a benchmark of `ROWS`, as `report.as_json` gives it.
        width: of the figure, in inches; where it is narrow the panels stand one above the other.
    """
    from matplotlib.figure import Figure

    wide = width >= _WIDE
    figure = Figure(figsize=(width, 0.42 * width if wide else 1.35 * width), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True) if wide else figure.subplots(2, 1, sharex=True)
    names: dict[str, Any] = {}
    for axes, measure in zip(panels, PRODUCTS, strict=True):
        for path in dict.fromkeys(row["path"] for row in record["rows"]):
            kept = [r for r in record["rows"] if (r["measure"], r["path"], r["status"]) == (measure.name, path, "ok")]
            kept.sort(key=lambda row: float(row["rows_per_expert"]))
            if kept:
                x, y = [row["rows_per_expert"] for row in kept], [row["limit_ratio"] for row in kept]
                color = names[path].get_color() if path in names else None
                (line,) = axes.plot(x, y, "o-", markersize=4, linewidth=1.5, color=color, label=_NAMES.get(path, path))
                names.setdefault(path, line)
        names["limit"] = axes.axhline(1, color="black", linewidth=0.9, label="limit")
        axes.set(xscale="log", yscale="log", title={"base forward": "forward", "base dX": "dX"}[measure.name])
        _ticks(axes, [row["rows_per_expert"] for row in record["rows"]])
    for axes in (panels[0],) if wide else panels:
        axes.set_ylabel("time / limit")
    for axes in panels if wide else (panels[-1],):
        axes.set_xlabel("rows per expert")
    figure.legend(
        handles=list(names.values()), loc="outside lower center", ncols=4 if wide else 2, frameon=False, fontsize=9
    )
    return figure


def _ticks(axes: Any, rows: list[float]) -> None:
    """Powers of two below, plain numbers at the side."""
    from matplotlib.ticker import NullFormatter, NullLocator, ScalarFormatter

    axes.set_xticks(sorted({round(row) for row in rows}))
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.9), high)
    axes.set_yticks([tick for tick in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32) if tick <= high])
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(True, linewidth=0.4, alpha=0.5)
