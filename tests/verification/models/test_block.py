"""An MoE block beside the limit of its products."""

from __future__ import annotations

import pytest
import torch
from benchmarks import WallClock

from mxref.kernels.models.sizes import TINY, Batch
from mxref.verification.bench.timing import Ceilings
from mxref.verification.models.block import Product, block_limit, products, time_block
from mxref.verification.models.build import adapted, decoder_layers, empty_model, filled

CPU = torch.device("cpu")
GATE_UP, DOWN = Product(32, 2880, 5760, 16, 4096, 16384), Product(32, 2880, 2880, 16, 16384, 16384)
"""The projections of gpt-oss-20b for 4 × 1024 tokens."""


def test_many_rows_are_bound_by_arithmetic() -> None:
    """Three base products a projection; LoRA's two forward, two again, and four backward."""
    base = 2.0 * 16384 * (2880 * 5760 + 2880 * 2880)
    lora = 2.0 * 16384 * 16 * ((2880 + 5760) + (2880 + 2880))
    limit = block_limit([GATE_UP, DOWN], Ceilings(1e12, 1e15))
    assert limit == pytest.approx((3 * base + 4 * lora) / 1e12)


def test_few_rows_are_bound_by_bytes() -> None:
    few = Product(32, 2880, 5760, 16, 2, 8)
    weights, adapters, rows = 32 * 2880 * 5760 * 17 / 32, 2 * 32 * 16 * 8640, 2 * (2 * 2880 + 8 * 5760)
    assert few.seconds(Ceilings(1e18, 1e12)) == pytest.approx(
        (2 * (weights + adapters + rows) + (weights + 2 * adapters + rows + 2 * 2 * 2880)) / 1e12
    )


def test_the_block_of_a_model_is_timed() -> None:
    model = adapted(filled(empty_model(TINY.config(1)), CPU, packed=True), TINY, 4, CPU, packed=True)
    block, batch = decoder_layers(model)[-1].mlp, Batch(1, 4)
    parts = products(block, 4, batch.size, 2)
    assert parts == [Product(4, 64, 128, 4, 4, 8), Product(4, 64, 64, 4, 8, 8)]
    found = time_block(block, parts, batch, CPU, WallClock(), Ceilings(1e12, 1e11), samples=1)
    assert (found.batch, found.rows, found.mode) == ("1 × 4", 8, "eager")
    assert found.median > found.limit == block_limit(parts, Ceilings(1e12, 1e11))
    assert all(parameter.grad is None for parameter in block.parameters())
