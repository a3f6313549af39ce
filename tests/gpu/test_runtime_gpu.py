"""On a GPU only: the same bits every time, no synchronisation with the host, and CUDA graphs of both passes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mxref import Problem, kernels
from mxref.verification.cases.case import Case, Sample
from mxref.verification.cases.draw import draw

pytestmark = pytest.mark.gpu

CASE = Case(
    "runtime", 8, 512, 320, 96, 2, 16, torch.bfloat16, torch.float32, bias=True, gate_slots=2, routing="sentinels"
)
FUSED = {"use_fused_dX": True, "use_fused_gather": True}
UNFUSED = {"use_fused_dX": False, "use_fused_gather": False}


def leaves(problem: Problem) -> dict[str, Tensor]:
    names = ("inputs", "lora_A", "lora_B", "expert_biases", "gates")
    return {name: x.requires_grad_() for name in names if (x := getattr(problem, name)) is not None}


def both_passes(sample: Sample, **options: Any) -> list[Tensor]:
    """The output and every gradient."""
    operands = list(leaves(sample.problem).values())
    y = kernels.parallel_linear_lora(**sample.problem.arguments(), **options)
    return [y.detach(), *torch.autograd.grad(y, operands, sample.grad_out)]


def assert_same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("options", [FUSED, UNFUSED], ids=["fused", "unfused"])
@pytest.mark.parametrize("case", [CASE, replace(CASE, name="long", tokens=4096, gate_slots=0)], ids=lambda c: c.name)
def test_ten_runs_give_the_same_bits(device: torch.device, case: Case, options: dict[str, bool]) -> None:
    sample = draw(case, device)
    first = both_passes(sample, **options)
    for _ in range(9):
        torch.randn(1 << 22, device=device).sort()  # other work in flight, other memory
        assert_same_bits(both_passes(sample, **options), first)


@pytest.mark.parametrize("options", [FUSED, UNFUSED], ids=["fused", "unfused"])
def test_no_synchronisation(device: torch.device, options: dict[str, bool]) -> None:
    sample = draw(CASE, device)
    expected = both_passes(sample, **options)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = both_passes(sample, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(got, expected)


@pytest.mark.parametrize("options", [FUSED, UNFUSED], ids=["fused", "unfused"])
def test_cuda_graph_of_both_passes(device: torch.device, options: dict[str, bool]) -> None:
    """Captured once, replayed on other values and another routing in the same buffers."""
    sample, other = draw(CASE, device, seed=0), draw(CASE, device, seed=1)
    both_passes(sample, **options)  # compiles
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both_passes(sample, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_passes(sample, **options)
    for drawn in (sample, other):
        expected = both_passes(drawn, **options)
        with torch.no_grad():
            for name, value in drawn.problem.arguments().items():
                if isinstance(value, Tensor):
                    getattr(sample.problem, name).copy_(value)
            sample.problem.expert_weights.packed.copy_(drawn.problem.expert_weights.packed)
            sample.problem.expert_weights.scales.copy_(drawn.problem.expert_weights.scales)
            sample.grad_out.copy_(drawn.grad_out)
        graph.replay()
        assert_same_bits(captured, expected)


def displaced(x: Tensor, elements: int = 1) -> Tensor:
    """The same values in memory that begins `elements` later than at a multiple of 16 bytes."""
    memory = x.new_empty(x.numel() + elements)
    return memory[elements:].view(x.shape).copy_(x.detach())


@pytest.mark.parametrize("options", [FUSED, UNFUSED], ids=["fused", "unfused"])
def test_a_known_launch_does_not_serve_operands_that_are_not_aligned(
    device: torch.device, options: dict[str, bool]
) -> None:
    """Compiled for multiples of 16 bytes it would fault, or read beside them."""
    sample = draw(CASE, device)
    expected = both_passes(sample, **options)
    names = ("inputs", "lora_A", "lora_B", "expert_biases", "gates")
    moved = replace(
        sample,
        problem=replace(sample.problem, **{name: displaced(getattr(sample.problem, name)) for name in names}),
        grad_out=displaced(sample.grad_out),
    )
    for drawn in (moved, sample, moved):
        assert_same_bits(both_passes(drawn, **options), expected)


def test_calls_on_two_streams_and_in_a_thread(device: torch.device) -> None:
    """A known launch goes to the stream and the device that are current in the thread that calls."""
    sample = draw(CASE, device)
    expected = both_passes(sample, **FUSED)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        got = both_passes(sample, **FUSED)
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(both_passes, sample, **FUSED).result()
    torch.cuda.synchronize()
    assert_same_bits(got, expected)
    assert_same_bits(other, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_operands_on_another_gpu_than_the_current_one() -> None:
    expected = [x.cpu() for x in both_passes(draw(CASE, torch.device("cuda", 0)), **FUSED)]
    for _ in range(2):
        assert_same_bits([x.cpu() for x in both_passes(draw(CASE, torch.device("cuda", 1)), **FUSED)], expected)


def test_one_routing_serves_two_calls(device: torch.device) -> None:
    sample = draw(CASE, device)
    problem = sample.problem
    routing = kernels.Routing(problem.sorted_scattered_idxs, problem.expert_offsets)
    expected = both_passes(sample, **FUSED)
    for _ in range(2):
        assert_same_bits(both_passes(sample, routing=routing, **FUSED), expected)
