"""Tables of the pages that records are shown on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def markdown_table(columns: Sequence[str], rows: Iterable[Iterable[str]], left: int = 1) -> Iterator[str]:
    """The lines of a table whose first `left` columns are words."""
    for cells in (columns, [*["---"] * left, *["---:"] * (len(columns) - left)], *rows):
        yield f"| {' | '.join(cells)} |"
