"""Every planted bug of calling."""

from __future__ import annotations

from mxref.verification.studies.calls import (
    attached,
    boundaries,
    callers,
    gradients,
    graphs,
    kept,
    layouts,
    memory,
    remainders,
    seldom,
    sizes,
    tails,
    usual,
    values,
)
from mxref.verification.studies.calls.layer import Bug

__all__ = ["BUGS"]

BUGS: tuple[Bug, ...] = tuple(
    found
    for module in (
        layouts,
        callers,
        kept,
        gradients,
        memory,
        values,
        sizes,
        boundaries,
        seldom,
        graphs,
        tails,
        remainders,
        usual,
        attached,
    )
    for found in vars(module).values()
    if isinstance(found, Bug)
)
"""In the order of their modules: memory layout, callers, what is kept, gradients, state, numbers, sizes, boundaries,
what is seldom asked, what else is in a graph, tails, remainders, what is usual in models, what is attached or left
behind."""
