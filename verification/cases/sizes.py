"""Sizes beside the domain's classes: what real models' sizes leave over behind whole tiles, small enough for anybody.

Tiles have 64, 128 or 256 columns, a vector 8, a loop over the contraction two or four steps a turn. 2880 is 64 more
than a multiple of 128, and an odd number of steps of 64; 5760 an odd number of tiles of 128; ranks are no powers of
two; an expert's last tile may be full where sentinels follow.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mxref.verification.cases.call import Call
from mxref.verification.cases.case import Case
from mxref.verification.cases.rounded import rounded
from mxref.verification.cases.scope import Scope

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_BASE = Case("integer", 4, 64, 96, 20, 2, 16, _BF16, data="integer", scaling=0.5, bias=True)
_SIDE_BY_SIDE = replace(_BASE, name="integer, experts side by side", dense=True, call=Call(weights="middle"))
_EXPERTS = replace(_BASE, K=32, N=32, tokens=250, top_k=8, grouped_in=True, grouped_out=True, rank=3)


def exact_sizes(scope: Scope) -> list[Case]:
    """Integer fixtures, most with results that 16 bits round; none for interpreted kernels, whose tiles are others'."""
    if scope.suite == "small" or scope.expense == "interpreted":
        return []
    return [
        rounded(_named("K 576, N 192, rank 24, many rows", experts=2, K=576, N=192, tokens=150, rank=24)),
        rounded(_named("K 704, N 320, rank 96", K=704, N=320, rank=96, dtype=_FP16, gate_slots=2)),
        rounded(_named("K 1024, N 1152, few rows", K=1024, N=1152, tokens=9, top_k=1, rank=24, gate_slots=1)),
        rounded(_named("dense, K 100, N 40", dense=True, K=100, N=40)),
        rounded(_named("K 1024, N 520, beyond TF32", K=1024, N=520, dtype=_FP32, gate_slots=2)),
        rounded(_named("K 576, N 1088, beyond TF32", K=576, N=1088, dtype=_FP32)),
        rounded(_named("full tiles before sentinels", experts=2, tokens=148, routing="whole_tiles")),
        _named("full tiles before sentinels, gates", experts=2, tokens=148, routing="whole_tiles", gate_slots=2),
        replace(_EXPERTS, name="integer, 128 experts", experts=128),
        replace(_EXPERTS, name="integer, 384 experts", experts=384, dtype=_FP16),
        _named("one row", experts=1, tokens=1, top_k=1),
        _named("gates zero", gate_slots=2, gate_values="zero"),
        _named("s·Z beyond fp16", dtype=_FP16, adapter_values="s·Z overflows", scaling=2.0, rank=4, bias=False),
        _SIDE_BY_SIDE,
        rounded(_SIDE_BY_SIDE),
    ]


def ordinary_sizes(scope: Scope) -> list[Case]:
    """Ordinary numbers: fp32 that no narrower format holds, along a long contraction."""
    if scope.suite == "small" or scope.expense == "interpreted":
        return []
    return [Case("K 1024, N 520, off every grid", 4, 1024, 520, 20, 2, 24, data="off_grid", gate_slots=2)]


def _named(name: str, **changes: object) -> Case:
    return replace(_BASE, name=f"integer, {name}", **changes)  # type: ignore[arg-type]
