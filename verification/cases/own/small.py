"""The small suite: what mutants are judged on: the gate's cases in kind, but smaller, so that all of them take seconds.

Two blocks of columns with a tail, two steps of the contraction with a tail, sentinels, empty experts, every flag. On a
GPU, where every case compiles anew, some of them, and what its tilings need.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mxref.verification.cases.call import Call
from mxref.verification.cases.case import Case
from mxref.verification.cases.elements import element_cases, one_hot_elements
from mxref.verification.cases.small import FULL_OF_COLUMNS, smallest, usual_dtype


def decode_cases(device_type: str) -> list[Case]:
    """Each finite byte once, and the others."""
    dtype = usual_dtype(device_type)
    dtypes = (torch.float32,) if device_type == "cpu" else (torch.float32, torch.bfloat16, torch.float16)
    return [*map(one_hot_elements, dtypes), *element_cases(dtype)[1:]]


def decoder_cases() -> list[Case]:
    """Stacks whose sizes are multiples of no tile, the second one chunk more than a whole number of programs."""
    return [
        Case("odd sizes", 2, 4128, 33, 0, 1, 0, torch.bfloat16),
        Case("one chunk more", 2, 32, 4097, 0, 1, 0, torch.bfloat16),
    ]


def integer_cases(device_type: str) -> list[Case]:
    """Sums that are exact in any order."""
    dtype = usual_dtype(device_type)
    return _integers(dtype) if device_type == "cpu" else [*_integers(dtype)[:5], *_for_gpu_tilings(dtype)]


def drawn_cases(device_type: str) -> list[Case]:
    """Ordinary numbers; on a GPU first what only it rounds: wider parameters, and fp32 without TF32."""
    dtype = usual_dtype(device_type)
    base = Case("plain", 3, 96, 160, 9, 2, 3, dtype, data="balanced", scaling=1 / 3, bias=True, routing="sentinels")
    wider = replace(base, gate_slots=2, use_fused_dX=True)
    rounded = [
        replace(wider, name="fp32 parameters", parameter_dtype=torch.float32),
        replace(wider, name="fp32", dtype=torch.float32),
    ]
    return [
        *([] if device_type == "cpu" else rounded),
        replace(base, gate_slots=2),
        replace(base, name="fused", use_fused_dX=True, use_fused_gather=True),
        replace(base, name="wide", data="wide", gate_slots=2, use_fused_dX=True),
        replace(base, name="boundary", data="boundary", K=192, N=64, use_fused_dX=True),
    ]


def behaviour_cases(device_type: str) -> list[Case]:
    """What a candidate is compared with itself on."""
    return [case for case in drawn_cases(device_type) if case.name in ("plain", "fused")]


def _integers(dtype: torch.dtype) -> list[Case]:
    base = smallest(dtype)
    tails = replace(base, name="tails", experts=3, K=96, N=162, tokens=9, routing="sentinels")
    grouped = replace(tails, name="grouped", grouped_in=True, grouped_out=True, routing="empty_experts")
    return [
        base,
        replace(tails, name="gates", gate_slots=2),
        replace(tails, name="fused", use_fused_dX=True, use_fused_gather=True, scaling=2.0),
        replace(grouped, experts=5, K=64, tokens=18, top_k=1, rank=20),
        replace(base, name="even sizes", K=128, N=256, grouped_in=True, gate_slots=2, routing="sentinels"),
        replace(base, name="wide", K=1056, N=129, tokens=5, top_k=1, use_fused_dX=True, gate_slots=1),
        replace(base, name="one row", N=33, tokens=1, top_k=1, gate_slots=1),
        replace(base, name="no rows", tokens=0, gate_slots=2),
        replace(base, name="17 rows", tokens=17, top_k=1, gate_slots=1),
        replace(base, name="one expert", K=64, tokens=70, top_k=1, rank=4, routing="one_expert"),
        _many_rows(dtype),
        replace(base, name="dA alone", call=Call(needs=("dA",))),
    ]


def _many_rows(dtype: torch.dtype) -> Case:
    """Hundreds of rows an expert, routed."""
    return replace(
        smallest(dtype), name="many rows", tokens=520, rank=0, bias=False, use_fused_dX=True, use_fused_gather=True
    )


def _for_gpu_tilings(dtype: torch.dtype) -> list[Case]:
    """Tiles of every height; rows in expert order, with sentinels behind them; more steps than a ring of copies holds,
    whole numbers of them and parts; columns that 16 does not divide, and more columns than a GPU runs programs, so that
    rows of sentinels are written last."""
    base = smallest(dtype)
    routed = replace(base, name="long", experts=3, K=1056, N=1056, tokens=60, gate_slots=2, routing="far_sentinels")
    ordered = replace(base, experts=3, K=544, N=544, top_k=1, rank=20, grouped_in=True, grouped_out=True)
    return [
        _many_rows(dtype),
        *(
            replace(ordered, name=f"in order, {tokens} rows", tokens=tokens, routing="far_sentinels")
            for tokens in (300, 600)
        ),
        replace(routed, use_fused_dX=True),
        replace(routed, name="long and even", K=1024, N=1024, tokens=9, gate_slots=0, use_fused_gather=True),
        replace(base, name="parts of turns", K=160, N=416, grouped_in=True, grouped_out=True),
        *(replace(base, name=f"{N} columns", N=N, use_fused_dX=True) for N in (15, 34, 129)),
        replace(base, name="a GPU full of columns", N=FULL_OF_COLUMNS, rank=0, routing="sentinels"),
    ]
