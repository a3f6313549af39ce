"""Parts of commands' output: terminal tables, numbers and names in words, JSON files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from mxref.verification.arithmetic.bounds import TENSORS
from mxref.verification.checks.finding import Finding

_MANY = 4.0
FOOTNOTE = "* Many ULP, and inside the derived bound: large terms cancel to almost nothing there, or a sum is long."


def new_table(*columns: str, title: str | None = None) -> Table:
    """A terminal table; ">" before a column's name aligns its numbers right."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, header_style="bright_black", pad_edge=False)
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


def write_json(path: Path, data: Any) -> Path:
    """Write strict JSON; the path.

    Raises:
        OSError: it cannot be written.
        ValueError: `data` holds NaN or infinity.
    """
    path.write_text(json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def many_ulp(finding: Finding) -> str:
    """The footnote's sign where a right result is many ULP from the exact value."""
    return "*" if finding.ok and (finding.max_ulp or 0.0) > _MANY else ""


def ulp_text(value: float | None) -> str:
    """A size in ULP, short."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "∞" if value > 0 else str(value)
    return f"{value:.2f}" if value < 100 else f"{value:.3g}".replace("e+0", "e").replace("e+", "e")


def detail_text(value: float | str | None) -> str:
    """A detail, numbers to four digits."""
    return "" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def tensor_order(tensor: str) -> tuple[int, str]:
    """Sort key: the order of the computation, then anything else by name."""
    return (TENSORS.index(tensor) if tensor in TENSORS else len(TENSORS), tensor)


def share_text(value: float | None) -> str:
    """A share of a bound: per cent inside, a multiple outside, "exact" for no error."""
    if value is None:
        return ""
    if value == 0:
        return "exact"
    if value < 0.01:
        return "< 1 %"
    if value <= 1:
        return f"{100 * value:.0f} %"
    return "∞ ×" if not math.isfinite(value) else f"{value:.3g} ×"


def plural(count: int, noun: str) -> str:
    """The noun, with an s unless the count is 1."""
    return noun if count == 1 else noun + "s"
