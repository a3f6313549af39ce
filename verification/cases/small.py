"""The smallest fixture, which others vary, and what is asked of it in few tokens: subsets, sequences of calls."""

from __future__ import annotations

from dataclasses import replace

import torch

from mxref.verification.cases.case import Case
from mxref.verification.cases.rounded import rounded
from mxref.verification.cases.scope import Scope

FULL_OF_COLUMNS = 132 * 4 * 128
"""N for which one row tile is more programs of 128 columns than an H100 runs at once: the next tile's begin later."""


def usual_dtype(device_type: str) -> torch.dtype:
    """Of activations where nothing says otherwise: bf16; on a CPU fp32, because kernels are interpreted there."""
    return torch.float32 if device_type == "cpu" else torch.bfloat16


def smallest(dtype: torch.dtype) -> Case:
    """The integer fixture that all others vary: two experts, one block, a tail of rank."""
    return Case("small", 2, 32, 32, 4, 2, 3, dtype, data="integer", scaling=0.5, bias=True)


def subset_cases(scope: Scope) -> list[Case]:
    """For every subset of the gradients: integer fixtures with everything that has one, and without gates.

    Where 16 bits are judged, also what they round, once on dense weights. None for mutants.
    """
    plain = replace(smallest(usual_dtype(scope.device_type)), name="subsets, no gates", routing="sentinels")
    cases = [replace(plain, name="subsets", gate_slots=2), replace(plain, K=96, tokens=24, bias=False)]
    if len(scope.dtypes) > 1:
        cases.append(rounded(replace(cases[0], dtype=torch.bfloat16)))
        cases.append(rounded(replace(plain, dtype=torch.bfloat16, dense=True)))
    return [] if scope.suite == "small" else cases


def sequence_cases(scope: Scope) -> list[Case]:
    """For sequences of calls: integer fixtures with sentinels, of a few tokens.

    With gates; and on dense weights, one expert's, in expert order. Where 16 bits are judged, those two in them, and
    one more, of more rows and columns, whose operands have one dtype, so that none is copied on its way.
    """
    base = replace(smallest(scope.dtypes[0]), name="sequences", tokens=6, routing="sentinels")
    gated = replace(base, experts=3, gate_slots=2)
    dense = replace(base, name="sequences, dense", experts=1, dense=True, grouped_out=True)
    cases = [gated, dense]
    if len(scope.dtypes) > 1:
        cases = [
            replace(gated, dtype=torch.bfloat16, parameter_dtype=torch.float32),
            replace(dense, dtype=torch.float16, parameter_dtype=torch.bfloat16),
            replace(gated, name="sequences, one dtype", K=128, N=128, tokens=32),
        ]
    return cases[:1] if scope.suite == "small" else cases
