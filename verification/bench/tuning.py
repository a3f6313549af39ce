"""What the table of tilings is chosen from: a whole training step under every tiling that fits, timed in turns.

Offline by design: dispatch reads a committed table and never a clock. A tiling is timed only if its results agree with
those of the table's own choice.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import torch

from mxref.kernels import Config, parallel_linear_lora
from mxref.kernels.device.configs import HOPPER_HEIGHTS, config_for, shape_class
from mxref.kernels.device.launch import architecture
from mxref.verification.bench.pairs import AGREEMENT, distance, runnable
from mxref.verification.bench.paths import Path
from mxref.verification.bench.timing import Clock, Run
from mxref.verification.bench.workloads import MEASURES, Shape, Workload
from mxref.verification.cases.small import usual_dtype


@dataclass(frozen=True)
class Timing:
    """A tiling's median time for one step of a shape, in seconds; `committed`: the table's own choice."""

    shape: str
    shape_class: str
    config: Config
    seconds: float
    committed: bool


@dataclass(frozen=True)
class Pinned:
    """What one tiling for all shapes costs, which gives a row the same bits at any batch size.

    `worst` and `mean` (geometric): its time over that of the table's choice, over the shapes.
    """

    config: Config
    worst: float
    mean: float


def candidates(arch: str, dtype: torch.dtype) -> list[Config]:
    """Every tiling worth a trial on `arch` with activations of `dtype` that fits its shared memory."""
    tried = [
        Config(m, n, k, warps, stages)
        for m, warps in ((16, 4), (32, 4), (64, 4), (128, 8))
        for n in (64, 128)
        for k in (32, 64)
        for stages in (1, 3, 4)
    ]
    if (arch, dtype) == ("sm_90", torch.bfloat16):
        tried += [Config(m, 128, 128, 8, stages, hopper=True) for m in HOPPER_HEIGHTS for stages in (2, 3, 4)]
    return [config for config in tried if _fits(config, arch, dtype)]


def compile_ahead(shapes: Sequence[Shape], device: torch.device, configs: Sequence[Config], jobs: int) -> None:
    """Run every tiling once on every shape, in `jobs` processes, so that Triton's cache holds what will be timed."""
    parts = [configs[job::jobs] for job in range(min(jobs, len(configs)))]
    with ProcessPoolExecutor(len(parts), get_context("spawn")) as pool:
        list(pool.map(partial(_run_each, shapes, device), parts))


def _run_each(shapes: Sequence[Shape], device: torch.device, configs: Sequence[Config]) -> None:
    for shape in shapes:
        workload = Workload.draw(shape, device, usual_dtype(device.type))
        for config in configs:
            _step(workload, config)()


def tune_shape(
    shape: Shape,
    device: torch.device,
    clock: Clock,
    configs: Sequence[Config],
    samples: int = 10,
    on_config: Callable[[Config], None] = lambda config: None,
) -> list[Timing]:
    """Time every tiling on one shape, fastest first; the table's choice is always among them.

    Args:
        shape: what to draw.
        device: where; bf16 on a GPU, fp32 under the interpreter.
        clock: the device's.
        configs: what to try, of `candidates`.
        samples: a tiling.
        on_config: called before each.

    Raises:
        ArithmeticError: a tiling's results do not agree with the committed one's.
    """
    dtype = usual_dtype(device.type)
    arch, workload = architecture(device), Workload.draw(shape, device, dtype)
    committed = config_for(arch, shape.rows, shape.experts, dtype)
    expected = _step(workload, committed)()
    timings = []
    for config in dict.fromkeys([committed, *configs]):
        on_config(config)
        run = _step(workload, config)
        apart = distance(run(), expected)
        if not apart <= AGREEMENT:
            raise ArithmeticError(f"{config} disagrees with the table's {committed} by {apart:.2g}")
        captured = clock.capture(run)
        seconds = statistics.median(clock.sample(captured.replay if captured else run, samples))
        kind = shape_class(shape.rows, shape.experts, dtype)
        timings.append(Timing(shape.name, kind, config, seconds, config == committed))
    return sorted(timings, key=lambda timing: timing.seconds)


def pinned_costs(tuned: Sequence[Sequence[Timing]]) -> list[Pinned]:
    """The cost of pinning each tiling that every shape was timed under, least at worst first."""
    ratios: dict[Config, list[float]] = {}
    for timings in tuned:
        committed = next(timing.seconds for timing in timings if timing.committed)
        for timing in timings:
            ratios.setdefault(timing.config, []).append(timing.seconds / committed)
    costs = [
        Pinned(config, max(times), statistics.geometric_mean(times))
        for config, times in ratios.items()
        if len(times) == len(tuned)
    ]
    return sorted(costs, key=lambda cost: cost.worst)


def _step(workload: Workload, config: Config) -> Run:
    """Forward and backward under one tiling."""
    call = partial(parallel_linear_lora, use_fused_dX=True, use_fused_gather=True, config=config)
    return runnable(workload, MEASURES[0], Path(str(config), "", call))


def _fits(config: Config, arch: str, dtype: torch.dtype) -> bool:
    try:
        config.check_fits(arch, dtype)
    except ValueError:
        return False
    return True
