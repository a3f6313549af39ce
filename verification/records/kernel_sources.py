"""The sources that decide what the kernels compute: a record made from others is stale."""

from __future__ import annotations

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
    texts, waiting = dict[str, str](), list(_ROOTS)
    while waiting:
        path = PACKAGE / f"{waiting.pop().replace('.', '/')}.py"
        name = path.relative_to(PACKAGE).as_posix()
        if name not in texts and path.is_file():
            texts[name] = path.read_text(encoding="utf-8")
            waiting += imported(texts[name], "mxref")
    return dict(sorted(texts.items()))
