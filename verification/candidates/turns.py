"""Two calls at the same time, in two threads that take turns: a race that is seldom lost is lost in every run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Condition, get_ident
from typing import Any, TypeVar

from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")

_PATIENCE = 0.5
"""Seconds between two looks at who does not hand over; one that stands still waits for what the other holds."""


def in_turns(first: Callable[[], T], second: Callable[[], T]) -> tuple[T, T]:
    """What two functions return, or what one raises; each hands over at every operation of torch in its thread."""
    turns = _Turns()
    with ThreadPoolExecutor(2) as threads:
        a, b = threads.map(turns.run, (0, 1), (first, second))
        return a, b


class _Turns:
    """Whose turn it is, of threads 0 and 1; `stuck`: those that stood still in their turn."""

    def __init__(self) -> None:
        self.changed, self.turn = Condition(), 0
        self.running, self.stuck = {0, 1}, set[int]()
        self.threads: dict[int, int] = {}

    def run(self, number: int, function: Callable[[], T]) -> T:
        """A function's result, as the thread of that number."""
        self.threads[number] = get_ident()
        self._wait(number)
        try:
            with _AtEachOperation(lambda: self.hand_over(number)):
                return function()
        finally:
            with self.changed:
                self.running.discard(number)
                self.changed.notify_all()

    def hand_over(self, number: int) -> None:
        """The other's turn, until it is this one's again."""
        with self.changed:
            self.stuck.discard(number)
            self.turn = 1 - number
            self.changed.notify_all()
        self._wait(number)

    def _wait(self, number: int) -> None:
        other, place = 1 - number, None
        with self.changed:
            while not self.changed.wait_for(
                lambda: self.turn == number or other not in self.running or other in self.stuck, _PATIENCE
            ):
                before, place = place, self._place(other)
                if place == before:
                    self.stuck.add(other)

    def _place(self, number: int) -> tuple[int, int] | None:
        """Where a thread is in its Python; None before it runs."""
        frame = sys._current_frames().get(self.threads.get(number, -1))
        return frame and (id(frame), frame.f_lasti)


class _AtEachOperation(TorchDispatchMode):
    """Calls back before each, but for those of Triton's interpreter, which has one state for all threads."""

    def __init__(self, call: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.call = call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not str(sys._getframe(1).f_globals.get("__name__")).startswith("triton."):
            self.call()
        return func(*args, **(kwargs or {}))
