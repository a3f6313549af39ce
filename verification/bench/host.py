"""How long the host is busy with one eager training step of the layer: what a small step on a GPU waits for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mxref.verification.bench.paths import COMPOSITE, Path
from mxref.verification.bench.workloads import MEASURES, Shape, Workload
from mxref.verification.cases.small import usual_dtype

__all__ = ["HostTime", "host_times"]

_LEAD_IN = 3
_TOGETHER = 16
"""Steps without a pause, as a trainer's layers follow each other: few enough launches that the driver queues them all,
so that the host never waits for the device."""


@dataclass(frozen=True)
class HostTime:
    """Median host seconds of one step of a shape: of what callers get, and of the composite in turns with it."""

    shape: str
    rows_per_expert: float
    ours: float
    composite: float


def host_times(
    shapes: Sequence[Shape],
    ours: Path,
    device: torch.device,
    count: int = 20,
    on_shape: Callable[[Shape], None] = lambda shape: None,
) -> list[HostTime]:
    """Time forward and backward of the layer until they return, without waiting for the device.

    Gradients are None before each step. A sample is the mean of 16 steps that begin on an idle device; the two sides
    take turns.

    Args:
        shapes: in this order.
        ours: what stands beside the composite.
        device: where.
        count: samples a side.
        on_shape: called before each shape.
    """
    found = []
    for shape in shapes:
        on_shape(shape)
        workload = Workload.draw(shape, device, usual_dtype(device.type))
        steps = [_step(workload, ours), _step(workload, COMPOSITE)]
        samples: list[list[float]] = [[], []]
        for _ in range(_LEAD_IN + count):
            for step, seconds in zip(steps, samples, strict=True):
                seconds.append(_seconds(step, device))
        mine, other = (statistics.median(seconds[_LEAD_IN:]) for seconds in samples)
        found.append(HostTime(shape.name, shape.rows / workload.active, mine, other))
    return found


def _step(workload: Workload, path: Path) -> Callable[[], None]:
    operands = workload.operands(MEASURES[0])
    leaves = workload.leaves_of(operands)
    prepared = path.prepare(operands, lambda: workload.dense)

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(path.call(**prepared), workload.grad_out)

    return step


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(_TOGETHER):
        step()
    return (time.perf_counter() - begin) / _TOGETHER
