"""Triton's interpreter with its programs in another order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from triton.runtime import interpreter


@contextmanager
def reversed_programs() -> Iterator[None]:
    """Within this context interpreted programs run from the last to the first: a GPU promises no order.

    What is not interpreted is as ever.
    """
    place = interpreter.InterpreterBuilder.set_grid_idx

    def from_the_end(builder: Any, *index: int) -> None:
        place(builder, *(size - 1 - i for size, i in zip(builder.grid_dim, index, strict=True)))

    with patch.object(interpreter.InterpreterBuilder, "set_grid_idx", from_the_end):
        yield
