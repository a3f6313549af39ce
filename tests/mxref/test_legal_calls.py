"""The golden layer takes every legal call."""

from __future__ import annotations

from legal_calls import LegalCalls

import mxref


class TestGolden(LegalCalls):
    layer = staticmethod(mxref.parallel_linear_lora)
