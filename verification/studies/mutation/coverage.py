"""Which jit functions each question runs: a mutant in another one cannot change what is found.

In the interpreter, where a jit function is called like any other. Functions of the host are left out: what they prepare
may be used again by a later question that does not call them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType

from mxref.verification.gate.plan import Item
from mxref.verification.studies.mutation.mutant import Mutant
from mxref.verification.studies.mutation.sources import Place, Source

Coverage = Mapping[str, frozenset[Place]]
"""An item's id -> the functions that it runs."""


@contextmanager
def functions_run(folder: Path) -> Iterator[set[Place]]:
    """Collect the functions of the sources in `folder` that run meanwhile."""
    known, found = set[CodeType](), set[Place]()

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code not in known:
            known.add(code)
            file = Path(code.co_filename)
            if file.is_relative_to(folder):
                found.add(Place(file.relative_to(folder).as_posix(), code.co_qualname))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def that_may_notice(
    items: Sequence[Item], mutant: Mutant, sources: Mapping[str, Source], coverage: Coverage
) -> Sequence[Item]:
    """The items that run the mutated jit function; all of them for another place, or where nobody runs it."""
    source = sources[mutant.place.file]
    if not any(function.jit and function.name == mutant.place.function for function in source.functions):
        return items
    return [item for item in items if mutant.place in coverage.get(item.id, {mutant.place})] or items
