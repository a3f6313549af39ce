"""What a sum over ranks adds to an error: real sums lie inside, in each declared order; a narrower dtype does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxref.rounding import round_to
from mxref.verification.arithmetic.interval import Estimate
from mxref.verification.distributed.reduction import Reduction, parse_reduction

SIZE = 4096


def parts_of(ranks: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(ranks)
    return [torch.randn(SIZE, generator=draw).double() for _ in range(ranks)]


def summed(parts: list[Tensor], dtype: torch.dtype, order: str) -> Tensor:
    """In the dtype, one rounding an operation; parts are rounded first, and a mean of their number is undone."""
    rounded = [round_to(part, dtype) for part in parts]
    if order == "tree" and len(parts) > 1:
        middle = (len(parts) + 1) // 2
        return round_to(summed(parts[:middle], dtype, order) + summed(parts[middle:], dtype, order), dtype)
    total = rounded[0]
    for part in rounded[1:]:
        total = round_to(total + part, dtype)
    return total


def radius(reduction: Reduction, parts: list[Tensor]) -> Tensor:
    exact, nothing = torch.stack(parts).sum(0), torch.zeros(SIZE, dtype=torch.float64)
    magnitude = torch.stack(parts).abs().sum(0)
    return reduction.radius(Estimate(exact, nothing), magnitude, [Estimate(part, nothing) for part in parts])


@pytest.mark.parametrize("order", ["any", "sequence", "tree"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_honest_sums_lie_inside(ranks: int, dtype: torch.dtype, order: str) -> None:
    parts = parts_of(ranks)
    allowed = radius(parse_reduction(f"{str(dtype).removeprefix('torch.')}, {order}"), parts)
    error = (summed(parts, dtype, order) - torch.stack(parts).sum(0)).abs()
    assert bool((error <= allowed).all())


def test_a_narrower_sum_lies_outside() -> None:
    parts = parts_of(4)
    error = (summed(parts, torch.bfloat16, "sequence") - torch.stack(parts).sum(0)).abs()
    assert float((error > radius(parse_reduction("float32"), parts)).float().mean()) > 0.9
    assert bool((error > radius(parse_reduction("float16, sequence"), parts)).any())  # one element fails a case


def test_a_named_order_is_tighter_than_any() -> None:
    parts = parts_of(8)
    anyhow, sequence, tree = (radius(parse_reduction(f"bfloat16, {o}"), parts) for o in ("any", "sequence", "tree"))
    assert bool((sequence < anyhow).all())
    assert float(tree.mean()) < float(sequence.mean())


@pytest.mark.parametrize("text", ["", "float64", "bfloat16, sideways", "bfloat16 tree"])
def test_what_is_not_known_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected one of float32, bfloat16, float16"):
        parse_reduction(text)
