"""The sources that decide what the kernels, or steps on several ranks, compute: a record made from others is stale."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import mxref
from mxref.verification.records.sources import imported

PACKAGE = Path(mxref.__file__).parent
"""Names of sources are relative to it: `formats.py`, `kernels/device/decode.py`."""

_ROOTS = (
    "kernels.layer.autograd",
    "kernels.device.dequant",
    "kernels.layer.scatter2scatter",
    "kernels.layer.activation",
    "routing",
)
"""What the judged operations are defined in, and the caller's way to their index tensors."""


def kernel_sources() -> dict[str, str]:
    """Text by name: the operations' modules and all of this package that they import, directly or not.

    So jitted functions, configurations, launchers, autograd and containers count; models, the gate and reports do not.
    """
    return _with_imports(_ROOTS)


def step_sources() -> dict[str, str]:
    """The same of this project's training steps: exchange, sharding, checkpoints and packed experts besides."""
    return _with_imports(["verification.distributed.shipped"])


def _with_imports(modules: Iterable[str]) -> dict[str, str]:
    texts, waiting = dict[str, str](), list(modules)
    while waiting:
        path = PACKAGE / f"{waiting.pop().replace('.', '/')}.py"
        name = path.relative_to(PACKAGE).as_posix()
        if name not in texts and path.is_file():
            texts[name] = path.read_text(encoding="utf-8")
            waiting += imported(texts[name], "mxref")
    return dict(sorted(texts.items()))
