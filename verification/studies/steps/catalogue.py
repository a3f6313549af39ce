"""Every planted mistake."""

from __future__ import annotations

from mxref.verification.studies.steps import shards, sums, travels
from mxref.verification.studies.steps.fault import Fault

__all__ = ["FAULTS"]

FAULTS: tuple[Fault, ...] = tuple(
    vars(found)["planted"]
    for module in (sums, shards, travels)
    for found in vars(module).values()
    if isinstance(found, type) and "planted" in vars(found)
)
"""In the order of their modules: sums over ranks, shards, what travels."""
