"""Where an implementation may round otherwise than the contract does, by declared name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from mxref.scattermoe import RoundingPoints

POINTS: dict[str, dict[str, Any]] = {
    "z-unrounded": {"z": False},
    "lora-after-output": {"lora_after_output": True},
    "gates-before-output": {"gates_before_output": True},
    "scaling-in-B": {"scaling_in_B": True},
}
"""The closed list of rounding points that may differ from the contract's: name -> fields of `RoundingPoints`."""


def declared_points(names: Iterable[str], dtype: torch.dtype) -> RoundingPoints:
    """The contract's rounding points for activations of `dtype`, changed as `names`, from POINTS, say."""
    points = RoundingPoints.contract(dtype)
    for name in names:
        points = replace(points, **POINTS[name])
    return points
