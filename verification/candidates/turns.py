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


def in_turns(*functions: Callable[[], T]) -> tuple[T, ...]:
    """What functions return, or what one raises; each hands over at every operation of torch in its thread."""
    turns = _Turns(len(functions))
    with ThreadPoolExecutor(len(functions)) as threads:
        return tuple(threads.map(turns.run, range(len(functions)), functions))


class _Turns:
    """Whose turn it is, of so many functions.

    Attributes:
        stuck: those that stood still in their turn.
        threads: where each one runs. All backward passes on a GPU run in one thread of autograd's.
    """

    def __init__(self, count: int) -> None:
        self.changed, self.turn, self.count = Condition(), 0, count
        self.running, self.stuck = set(range(count)), set[int]()
        self.threads: dict[int, int] = {}

    def run(self, number: int, function: Callable[[], T]) -> T:
        """The result of the function of that number."""
        self._wait(number)
        try:
            with _AtEachOperation(lambda: self.hand_over(number)):
                return function()
        finally:
            with self.changed:
                self.running.discard(number)
                self.changed.notify_all()

    def hand_over(self, number: int) -> None:
        """The next one's turn, until it is this one's again."""
        with self.changed:
            self.turn = number + 1
            self.changed.notify_all()
        self._wait(number)

    def _holder(self, waiting: int) -> int:
        """Who may run: the next in turn that has not ended, does not stand still, and needs no thread that waits."""
        places = ((self.turn + step) % self.count for step in range(self.count))
        here = self.threads[waiting]
        may = (each for each in places if each in self.running - self.stuck)
        return next((each for each in may if each == waiting or self.threads.get(each) != here), -1)

    def _wait(self, number: int) -> None:
        place = None
        with self.changed:
            self.threads[number] = get_ident()
            self.stuck.discard(number)
            while not self.changed.wait_for(lambda: self._holder(number) == number, _PATIENCE):
                before, place = place, (holder := self._holder(number), self._place(holder))
                if place == before:
                    self.stuck.add(holder)
                    self.changed.notify_all()

    def _place(self, number: int) -> tuple[int, int] | None:
        """Where a function is in its Python; None before it runs."""
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
