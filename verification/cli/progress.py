"""Progress of a long command: a bar on a terminal, occasional lines in a file or a pipe."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_EVERY = 15.0
"""Seconds between two lines where there is no terminal."""


class Meter:
    """Shows on stderr how many of `total` steps are done, and what is being done; a context manager."""

    def __init__(self, total: int | None = None) -> None:
        self._total, self._done, self._said = total, 0, time.monotonic()
        console = Console(stderr=True)
        text = TextColumn("{task.description}", style="bright_black", markup=False)
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), text)
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, text: str, done: int | None = None, total: int | None = None) -> None:
        """Say what is being done; `done` and `total` where changed."""
        self._done, self._total = (self._done if done is None else done), (self._total if total is None else total)
        self._bar.update(self._task, completed=self._done, total=self._total, description=text)
        if self._bar.disable and time.monotonic() - self._said > _EVERY:
            of = "" if self._total is None else f" of {self._total}"
            print(f"mxref: {self._done}{of}, {text}", file=sys.stderr, flush=True)
            self._said = time.monotonic()

    def advance(self, text: str, steps: int = 1) -> None:
        """`steps` more are done."""
        self.show(text, self._done + steps)
