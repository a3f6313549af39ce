"""What a sum over ranks adds to a gradient's error: declared by its dtype and its order.

Each rank's partial sum is rounded to the declared dtype, the partial sums are added in it, and a mean divides once
more. Every one of these operations errs by at most u of the dtype, relative to its result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mxref.rounding import min_exponent, precision_bits
from mxref.verification.arithmetic.accumulator import gamma
from mxref.verification.arithmetic.interval import Estimate

__all__ = ["Reduction", "parse_reduction"]

RankOrder = Literal["any", "sequence", "tree"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Reduction:
    """How partial sums of ranks are brought together.

    Attributes:
        dtype: that each addition rounds to, and that the partial sums are rounded to before.
        order: `sequence`: one partial sum a rank, added from rank 0 up; `tree`: the same by halves, (0 + 1) + (2 + 3);
            `any`: any order, and any partition of the terms into partial sums, as where experts own their gradients.
    """

    dtype: torch.dtype = torch.float32
    order: RankOrder = "any"

    @property
    def unit(self) -> float:
        """u: one rounding errs by at most this, relative to its result."""
        return float(2.0 ** -precision_bits(self.dtype))

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}, {self.order}"

    def radius(self, whole: Estimate, magnitude: Tensor, partials: Sequence[Estimate]) -> Tensor:
        """How far an honest reduced sum can be from `whole.centre`: fp64 of its shape.

        Args:
            whole: the sum over all ranks; its radius holds for any order of local, fp32 summation.
            magnitude: Σ|terms| of it.
            partials: what each rank has; used by the orders that name them.
        """
        if self.order == "any":
            roundings = len(partials) + 1
            return whole.radius + gamma(roundings, self.unit) * (magnitude + whole.radius) + roundings * self._smallest
        rounded = [self._rounded(partial) for partial in partials]
        total = rounded[0]
        if self.order == "sequence":
            for partial in rounded[1:]:
                total = self._sum(total, partial)
        else:
            total = self._halves(rounded)
        return self._rounded(total).radius

    def _halves(self, partials: Sequence[Estimate]) -> Estimate:
        if len(partials) == 1:
            return partials[0]
        half = (len(partials) + 1) // 2
        return self._sum(self._halves(partials[:half]), self._halves(partials[half:]))

    def _sum(self, a: Estimate, b: Estimate) -> Estimate:
        return self._rounded(Estimate(a.centre + b.centre, a.radius + b.radius))

    def _rounded(self, x: Estimate) -> Estimate:
        """One rounding to the dtype: the centre stays the exact value."""
        return Estimate(x.centre, x.radius + self.unit * x.reach + self._smallest)

    @property
    def _smallest(self) -> float:
        """What one rounding loses at most below the normal range."""
        return float(2.0 ** (min_exponent(self.dtype) - precision_bits(self.dtype)))


def parse_reduction(text: str) -> Reduction:
    """`float32`, `bfloat16, tree`: a dtype, and an order where it is not any.

    Raises:
        ValueError: either is unknown.
    """
    name, _, order = (part.strip() for part in text.partition(","))
    known = get_args(RankOrder)
    if name not in _DTYPES or (order or "any") not in known:
        raise ValueError(
            f"mxref_reduction is {text!r}; expected one of {', '.join(_DTYPES)} and, behind a comma, one of "
            f"{', '.join(known)}"
        )
    return Reduction(_DTYPES[name], next(each for each in known if each == (order or "any")))
