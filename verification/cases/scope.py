"""What a candidate is asked about: how much, where, in which activation dtypes, over which part of the domain."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from mxref.verification.cases.domain import Expense
from mxref.verification.cases.subset import Subset

Suite = Literal["small", "quick", "full"]


@dataclass(frozen=True)
class Scope:
    """One plan's extent.

    Attributes:
        suite: `small`, seconds: what a mutant is judged by; `quick`, what a commit is judged by, every pair of classes
            of the domain; `full`, what a release is judged by, every triple.
        device_type: "cpu" or "cuda".
        seed: of every draw, and of the arrays that cover the domain.
        interpreted: kernels run in Triton's interpreter, in fp32 without rounding points; so only fp32 activations are
            asked for, and costly classes have stand-ins in every suite.
        subset: the part of the domain that the candidate declares to cover.
    """

    suite: Suite
    device_type: str
    seed: int = 0
    interpreted: bool = True
    subset: Subset = field(default_factory=Subset)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Activation dtypes that are judged."""
        narrow = self.device_type != "cpu" or not self.interpreted
        return (torch.float32, torch.bfloat16, torch.float16) if narrow else (torch.float32,)

    @property
    def expense(self) -> Expense:
        """What the suite may cost."""
        if self.device_type != "cpu":
            return "any"
        return "interpreted" if self.interpreted else "any" if self.suite == "full" else "cheap"
