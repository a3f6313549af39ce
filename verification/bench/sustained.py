"""How fast base products are without a pause, as a long training step runs them: and the GPU's clock and power then.

A GPU that is busy for long lowers its clock until it stays within its power limit. Samples with something else between
them, as the benchmark takes them, meet a higher clock: they rank two ways by time at that clock, these by energy.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch

from mxref.verification.bench.pairs import runnable
from mxref.verification.bench.paths import COMPOSITE, Path
from mxref.verification.bench.rows import PRODUCTS
from mxref.verification.bench.timing import EventClock
from mxref.verification.bench.workloads import Measure, Shape, Workload
from mxref.verification.cases.small import usual_dtype

__all__ = ["Reading", "Sustained", "readings", "sustained"]

_TOGETHER = 10
"""Calls between two looks at the clock on the wall, of which the GPU always has some more to do."""


@dataclass(frozen=True)
class Reading:
    """What the GPU reported at one moment: its multiprocessors' clock, and the power it draws."""

    megahertz: float
    watts: float


@dataclass(frozen=True)
class Sustained:
    """One way to compute one product of a shape, without a pause: median seconds of a call, clock, power."""

    shape: str
    rows_per_expert: float
    measure: str
    path: str
    seconds: float
    megahertz: float
    watts: float


Readings = Callable[[], AbstractContextManager[list[Reading]]]
"""A context; behind it the list holds what was reported meanwhile."""


def sustained(
    shapes: Sequence[Shape],
    ours: Sequence[Path],
    device: torch.device,
    watch: Readings,
    seconds: float = 2.0,
    on_shape: Callable[[Shape], None] = lambda shape: None,
) -> list[Sustained]:
    """Repeat the forward product, then dX, each way for `seconds`; the second half of them counts.

    Args:
        shapes: in this order.
        ours: what stands beside the composite, which comes first.
        device: where.
        watch: of that device, such as `readings`.
        seconds: a way.
        on_shape: called before each shape.
    """
    found, clock = [], EventClock(device) if device.type == "cuda" else None
    for shape in shapes:
        on_shape(shape)
        workload = Workload.draw(shape, device, usual_dtype(device.type))
        for measure in PRODUCTS:
            for path in (path for path in (COMPOSITE, *ours) if path.covers(measure)):
                call = _replayable(workload, measure, path, clock)
                with watch() as seen:
                    middle = _without_a_pause(call, device, seconds)
                counted = seen[len(seen) // 2 :]
                found.append(
                    Sustained(
                        shape.name,
                        shape.rows / workload.active,
                        measure.name,
                        path.name,
                        middle,
                        statistics.median(reading.megahertz for reading in counted),
                        statistics.median(reading.watts for reading in counted),
                    )
                )
    return found


def _replayable(workload: Workload, measure: Measure, path: Path, clock: EventClock | None) -> Callable[[], object]:
    """The product as a CUDA graph, so that no host is waited for; where it cannot be captured, as it is."""
    if clock is None:
        return runnable(workload, measure, path)
    with clock.stream():
        run = runnable(workload, measure, path)
        run()
        captured = clock.capture(run)
    return run if captured is None else captured.replay


def _without_a_pause(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median seconds of a call in the second half of so many; the host is always some calls ahead."""
    moments, queued, event = [time.perf_counter()], list[Any](), cast(Any, torch.cuda.Event)
    while len(moments) < 4 or moments[-1] - moments[0] < seconds:
        for _ in range(_TOGETHER):
            call()
        if device.type == "cuda":
            queued.append(event())
            queued[-1].record()
            if len(queued) > 1:
                queued.pop(0).synchronize()
        moments.append(time.perf_counter())
    times = [(after - before) / _TOGETHER for before, after in pairwise(moments)]
    return statistics.median(times[len(times) // 2 :])


def readings(device: torch.device) -> Readings:
    """`watch` of a GPU: what `nvidia-smi`, which comes with the driver, reports ten times a second.

    Raises:
        FileNotFoundError: there is none.
    """
    properties: Any = torch.cuda.get_device_properties(device)
    query = ["--query-gpu=clocks.sm,power.draw.instant", "--format=csv,noheader,nounits", "--loop-ms=100"]
    command = ["nvidia-smi", f"--id=GPU-{properties.uuid}", *query]

    @contextmanager
    def watch() -> Iterator[list[Reading]]:
        seen: list[Reading] = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield seen
            finally:
                process.terminate()
            assert process.stdout is not None
            seen += (parsed for line in process.stdout if (parsed := _reading(line)) is not None)

    return watch


def _reading(line: str) -> Reading | None:
    """A line of `nvidia-smi`; None for one that was cut off, or where the GPU does not tell."""
    fields = line.split(",")
    try:
        return Reading(float(fields[0]), float(fields[1]))
    except (ValueError, IndexError):
        return None
