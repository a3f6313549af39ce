"""Every way on every shape, as pytest-benchmark sees it: its rounds are device times, replayed.

`pytest tests/bench -m gpu --benchmark-autosave` keeps them; hold a later run against a pinned one with
`--benchmark-compare=0001`. Ratios, and what they may become, are `mxref history`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, pairwise

import pytest
import torch

from mxref.verification.bench.benchmark import Bench
from mxref.verification.bench.paths import REFERENCES, every_path
from mxref.verification.bench.workloads import CASES, LARGE, MEASURES

pytest.importorskip("pytest_benchmark")

_ticks: Iterator[float] = iter(())


def device_time() -> float:
    """The timer: what it returns at a round's start and end lie one sample apart."""
    return next(_ticks)


def replay(samples: Sequence[float]) -> None:
    """Load the timer: 0, s0, s0, s0 + s1, s0 + s1, …"""
    global _ticks
    ends = list(accumulate(samples, initial=0.0))
    _ticks = chain.from_iterable(pairwise(ends))


def _parameters() -> list[tuple[str, str, str]]:
    ways = [*REFERENCES, *every_path(installed=torch.cuda.is_available())]
    return [
        (shape.name, measure.name, way.name)
        for shape in (*CASES, *LARGE)
        for measure in MEASURES
        for way in ways
        if way.covers(measure)
    ]


@pytest.mark.gpu
@pytest.mark.benchmark(timer=device_time, warmup=False)
@pytest.mark.parametrize(("shape", "measure", "path"), _parameters())
def test_speed(bench: Bench, benchmark, shape: str, measure: str, path: str) -> None:
    assert bench.green, "the gate is red: nothing was timed; see the summary"
    row = next(row for row in bench.rows if (row.shape, row.measure, row.path) == (shape, measure, path))
    if row.status == "out of memory":
        pytest.skip("out of memory")
    assert row.ok, row.status
    samples = [sample for samples in row.samples for sample in samples]
    benchmark.group = f"{shape}, {measure}"
    benchmark.extra_info |= {
        "mode": row.mode,
        f"ratio_to_{row.reference}": row.ratio,
        "ratio_to_limit": row.limit_ratio,
        "eager": row.eager,
        "rows_per_s": row.rows_per_s,
        "flops_per_s": row.flops_per_s,
        "bytes_per_s": row.bytes_per_s,
        "extra_bytes": row.extra_bytes,
    }
    replay(samples)
    benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)


@pytest.mark.benchmark(timer=device_time, warmup=False)
def test_rounds_are_the_samples(benchmark) -> None:
    replay([0.25, 0.5, 0.125])
    benchmark.pedantic(lambda: None, rounds=3, iterations=1)
    if benchmark.enabled:
        assert benchmark.stats.stats.data == [0.25, 0.5, 0.125]
