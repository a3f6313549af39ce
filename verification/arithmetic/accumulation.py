"""What an implementation declares of its arithmetic: rounding points and fp32 sums, which `accumulator` bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mxref.scattermoe import RoundingPoints

POINTS: dict[str, dict[str, Any]] = {
    "z-unrounded": {"z": False},
    "lora-after-output": {"lora_after_output": True},
    "gates-before-output": {"gates_before_output": True},
    "scaling-in-B": {"scaling_in_B": True},
}
"""The closed list of rounding points that may differ from the contract's: name -> fields of `RoundingPoints`."""


def declared_points(names: Iterable[str], dtype: torch.dtype) -> RoundingPoints:
    """The contract's rounding points for activations of `dtype`, changed by `names` from POINTS."""
    points = RoundingPoints.contract(dtype)
    for name in names:
        points = replace(points, **POINTS[name])
    return points


Product = Literal["Z", "Y", "V", "D", "dA", "dB"]
"""The six long products, named after their result; Y and D mean their base products x·W and dY·Wᵀ."""


@dataclass(frozen=True)
class Order:
    """In which order one product visits its terms.

    Attributes:
        permutation: n -> the n term indices in the order of visit; None for 0..n−1.
        parts: split-K: contiguous parts of equally many steps (the last may have fewer), summed apart, then added.
    """

    permutation: Callable[[int], Tensor] | None = None
    parts: int = 1


@dataclass(frozen=True)
class Accumulation:
    """What an implementation declares about its fp32 sums.

    Attributes:
        kind: `tensor_core`: steps of `step` products, aligned to the largest exponent, truncated to `fraction_bits` and
            added to the accumulator, which is truncated to fp32; fp32 operands (TF32 is forbidden) are bounded in any
            order. `fp32_blocks`: blocks of `step` products, each summed in fp32 in any order, rounded to nearest and
            added to the accumulator; LoRA's sum over the rank is one block. A step of 1 is a chain of fused
            multiply-adds. `undeclared`: any order.
        step: terms between two roundings of the accumulator (for `fp32_blocks`, BK).
        fraction_bits: of the aligned sum, `tensor_core` only.
        lora: `first`: the LoRA product, times s, is in the accumulator before the base product. `apart`: it has its own
            accumulator, times s and added at the end.
        bias_inside: the bias is in the accumulator before the base product; otherwise added at the end.
        orders: of products that do not visit their terms in order, in one part.
    """

    kind: Literal["tensor_core", "fp32_blocks", "undeclared"]
    step: int = 16
    fraction_bits: int = 25
    lora: Literal["first", "apart"] = "first"
    bias_inside: bool = False
    orders: Mapping[Product, Order] = field(default_factory=dict)

    @property
    def declared(self) -> bool:
        """Whether the bound follows the sum; otherwise it is order-free, and weak."""
        return self.kind != "undeclared"

    def __str__(self) -> str:
        """The name in ACCUMULATIONS, or the declaration in words."""
        name = next((name for name, known in ACCUMULATIONS.items() if known == self), None)
        if name is not None:
            return name
        kind = {
            "tensor_core": f"tensor core, steps of {self.step}, {self.fraction_bits} fraction bits",
            "fp32_blocks": f"fp32 in blocks of {self.step}",
            "undeclared": "any order",
        }[self.kind]
        parts = [kind, f"LoRA product {self.lora}", "bias first" if self.bias_inside else "bias last"]
        return ", ".join([*parts, *(f"{product} in its own order" for product in self.orders)])


ACCUMULATIONS: dict[str, Accumulation] = {
    "tensor-core-sm90": Accumulation("tensor_core", step=16, fraction_bits=25),  # also sm_100, sm_120
    "tensor-core-sm80": Accumulation("tensor_core", step=8, fraction_bits=24),  # a k16 instruction runs as two of k8
    **{f"fp32-blocks-{step}": Accumulation("fp32_blocks", step=step) for step in (1, 16, 32, 64, 128, 256)},
    "undeclared": Accumulation("undeclared"),
}
"""Declarations by name. Step and fraction bits of tensor cores: MMA-Sim, table of fused dot-add parameters."""


def default_accumulation(device: torch.device) -> Accumulation:
    """First tried without a declaration: the GPU's tensor cores, or blocks of 64."""
    if device.type == "cpu":
        return ACCUMULATIONS["fp32-blocks-64"]
    newest = torch.cuda.get_device_capability(device) >= (9, 0)
    return ACCUMULATIONS["tensor-core-sm90" if newest else "tensor-core-sm80"]
