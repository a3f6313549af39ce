"""What every command's output is made of: tables in a terminal and in Markdown, and files of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


def new_table(*columns: str, title: str | None = None) -> Table:
    """A quiet table for a terminal; ">" before a column's name puts its cells, numbers, at the right."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, header_style="bright_black", pad_edge=False)
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


def markdown_table(columns: Sequence[str], rows: Iterable[Iterable[str]], left: int = 1) -> Iterator[str]:
    """The lines of a table whose first `left` columns are words."""
    for cells in (columns, [*["---"] * left, *["---:"] * (len(columns) - left)], *rows):
        yield f"| {' | '.join(cells)} |"


def write_json(path: Path, data: Any) -> Path:
    """Write strict JSON; the path.

    Raises:
        OSError: it cannot be written.
        ValueError: `data` holds NaN or infinity.
    """
    path.write_text(json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
