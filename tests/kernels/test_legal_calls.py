"""The kernels take every legal call, whichever way they are told to take."""

from __future__ import annotations

from functools import partial

from legal_calls import LegalCalls

from mxref import kernels


class TestFused(LegalCalls):
    layer = staticmethod(partial(kernels.parallel_linear_lora, use_fused_dX=True, use_fused_gather=True))


class TestUnfused(LegalCalls):
    layer = staticmethod(kernels.parallel_linear_lora)
