"""Which process asks for which item: each takes the next one when it is done, so that all end together."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context

_LOOK = 0.1
"""Seconds between two looks at whether an item is ready."""


class Numbers:
    """Items' numbers, each given once to one of the processes that share this object.

    Args:
        numbers: which, ascending; they may go on behind the last item.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        context = get_context("spawn")
        self._numbers, self._given = numbers, context.Value("q", 0)
        self._ready = context.Value("q", sys.maxsize)

    def ready(self, items: int = sys.maxsize) -> None:
        """From now on so many items, from the first, may be asked; before the first call all."""
        self._ready.value = items

    def taken(self, waiting: Callable[[], None]) -> Iterator[int]:
        """Take one number after the other, each when its item is ready; `waiting` is called again and again before."""
        while True:
            with self._given.get_lock():
                at = self._given.value
                self._given.value += 1
            if at >= len(self._numbers):
                return
            while self._numbers[at] >= self._ready.value:
                waiting()
                time.sleep(_LOOK)
            yield self._numbers[at]
