"""What a clone of the repository has beside the wheel: whatever judges, times or records this project's own sources.

The wheel is small because it leaves that out (`exclude` in pyproject.toml): studies of the gate, benchmarks, whole
models, steps on several ranks, records, checks of this project's kernels alone (folders named `own`), and
implementations from elsewhere. All of it is reached from the rest through `of_a_clone`, by name.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

EVIDENCE = Path(__file__).resolve().parent / "evidence"
"""Where records are kept, one folder a device."""

IS_CLONE = find_spec("mxref.verification.studies") is not None
"""Whether this is a clone, an unpacked source archive, or an editable install of either."""


class LeftOutError(ImportError):
    """The wheel has not got it; the message says what, and what to do."""


def of_a_clone(module: str, what: str) -> ModuleType:
    """A module of `mxref.verification` that the wheel leaves out.

    Args:
        module: its name below `mxref.verification`.
        what: what needs it, for a person.

    Raises:
        LeftOutError: this is no clone.
    """
    if not IS_CLONE:
        raise LeftOutError(
            f"{what} is left out of the wheel, which holds what judges any kernel; to use it, clone the repository, "
            "run `pip install --editable .` there, and try again"
        )
    return import_module(f"mxref.verification.{module}")
