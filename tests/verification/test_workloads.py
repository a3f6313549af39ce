"""What is timed: its limit, its work, its routing."""

from __future__ import annotations

import pytest
import torch
from benchmarks import (
    BASE,
    BASE_DX,
    BASE_FORWARD,
    CPU,
    DECODE,
    FORWARD,
    STEP,
    TINY,
)

import mxref
from mxref.verification.bench import workloads
from mxref.verification.bench.timing import Ceilings
from mxref.verification.bench.workloads import Shape, Workload


class TestWorkloads:
    def test_limit(self) -> None:
        """The formula by hand: bound by bytes when thin, by arithmetic when thick."""
        ceilings = Ceilings(800e12, 3e12)
        thin = Workload.draw(Shape("thin", 4, 64, 32, 3, 2), CPU)
        packed = thin.active * 64 * 32 * 17 / 32 + 6 * 64 * 2 + 6 * 32 * 2
        assert ceilings.seconds(*thin.least(BASE_FORWARD)) == pytest.approx(packed / 3e12)
        assert ceilings.seconds(*thin.least(BASE)) == pytest.approx(2 * packed / 3e12)
        thick = Ceilings(1e3, 3e12)
        assert thick.seconds(*thin.least(STEP)) == pytest.approx(2 * 2 * 6 * 64 * 32 / 1e3)
        assert thin.least(BASE_FORWARD) == thin.least(BASE_DX)
        for measure, inputs in ((FORWARD, 3), (BASE_FORWARD, 6)):  # the base products' rows are gathered already
            assert thin.operands(measure)["inputs"].shape == (inputs, 64)
            assert thin.bytes(measure) == pytest.approx(packed + (inputs - 6) * 64 * 2)
        decoding = thin.active * 64 * 32 * (17 / 32 + 2)
        assert thin.least(DECODE) == (0.0, pytest.approx(decoding))
        assert ceilings.seconds(*thin.least(DECODE)) == pytest.approx(decoding / 3e12)

    def test_work_counts_adapters(self) -> None:
        workload = Workload.draw(TINY, CPU)
        products = {"base": 2, "lora": 2 * TINY.rows * 4 * (64 + 32)}
        assert workload.flops(STEP) == workload.flops(BASE) + 3 * products["lora"]
        assert workload.flops(FORWARD) == workload.flops(BASE_FORWARD) + products["lora"]
        assert workload.flops(BASE_DX) == workload.flops(BASE_FORWARD)
        assert workload.flops(DECODE) == 0.0

    def test_routings(self) -> None:
        generator = torch.Generator().manual_seed(0)
        balanced = Shape("b", 16, 64, 32, 32, 4, "balanced").route(generator)
        assert torch.bincount(balanced.flatten(), minlength=16).tolist() == [8] * 16
        few = Shape("f", 32, 64, 32, 40, 8, "ten_active").route(generator)
        assert few.unique().numel() == 10
        for choice in (balanced, few):
            assert all(row.unique().numel() == row.numel() for row in choice)

    def test_the_issue_s_shapes(self) -> None:
        assert [shape.rows for shape in workloads.CASES] == [32768, 32768, 2048, 8192, 32768, 131072, 32768, 32768]
        assert {shape.rank for shape in (*workloads.CASES, *workloads.LARGE)} == {16}

    def test_dense_weights_are_the_packed_ones(self) -> None:
        workload = Workload.draw(TINY, CPU, torch.float32)
        weights = workload.problem.expert_weights
        assert isinstance(weights, mxref.MXWeights)
        assert torch.equal(workload.dense, mxref.decode_mxfp4(weights, torch.float32).mT)
        assert workload.dense.is_contiguous()
