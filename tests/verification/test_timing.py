"""The clocks: ceilings, memory beyond the results, and the first call of a fresh process."""

from __future__ import annotations

import itertools
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import pytest
import torch
from benchmarks import (
    CPU,
    TINY,
    FakeClock,
    WallClock,
)
from torch import Tensor

import mxref
from mxref.verification.bench import first_call
from mxref.verification.bench.paths import Path
from mxref.verification.bench.timing import Ceilings, EventClock, measure_ceilings
from mxref.verification.bench.workloads import Shape, Workload


def test_wall_clock() -> None:
    ticks = itertools.accumulate([1, 0.5, 1, 0.25])
    assert WallClock(lambda: next(ticks)).sample(lambda: None, 2) == [0.5, 0.25]


class TestExtraMemory:
    """What a call holds at its peak, beyond what was there and what it returns."""

    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> EventClock:
        """A GPU's clock whose allocator says that 100 bytes were there, at most 1000 during the call."""
        for name in ("synchronize", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 1000)
        clock = EventClock.__new__(EventClock)
        clock._device = CPU
        return clock

    def allocated(self, monkeypatch: pytest.MonkeyPatch, before: int, after: int) -> None:
        answers = iter((before, after))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: next(answers))

    def test_results_are_left_out_each_storage_once(self, clock: EventClock, monkeypatch: pytest.MonkeyPatch) -> None:
        y, gradient = torch.empty(40, dtype=torch.uint8), torch.empty(25, dtype=torch.float32)
        self.allocated(monkeypatch, 100, 900)
        assert clock.extra_bytes(lambda: (y, y[:10].view(2, 5), gradient)) == 1000 - 100 - 140

    def test_what_stays_behind_and_is_no_result_counts(self, clock: EventClock, monkeypatch: Any) -> None:
        self.allocated(monkeypatch, 100, 700)
        assert clock.extra_bytes(lambda: (torch.empty(40, dtype=torch.uint8),)) == 1000 - 100 - 40

    def test_results_that_were_there_before_are_no_part_of_it(self, clock: EventClock, monkeypatch: Any) -> None:
        self.allocated(monkeypatch, 100, 100)
        assert clock.extra_bytes(lambda: (torch.empty(40, dtype=torch.uint8),)) == 1000 - 100


class TestFirstCall:
    def test_a_whole_step_of_a_fresh_process(self) -> None:
        begin = time.perf_counter()
        seconds = first_call.first_call(Shape("tiny", 2, 64, 32, 4, 1, rank=4), CPU)
        assert 0 < seconds < time.perf_counter() - begin

    def test_with_an_empty_cache_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        caches = []

        def run(command: Sequence[str], env: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
            caches.append(env["TRITON_CACHE_DIR"])
            assert os.listdir(caches[0]) == []
            return subprocess.CompletedProcess(command, 0, "1.5\n", "")

        monkeypatch.setattr(subprocess, "run", run)
        assert first_call.first_call(TINY, CPU) == 1.5
        assert not File(caches[0]).exists()

    def test_a_process_that_fails_says_why(self) -> None:
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            first_call.first_call(replace(TINY, experts=0, routing="balanced"), CPU)

    def test_both_passes_count_and_drawing_does_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = [0.0]

        def later(seconds: float) -> None:
            clock[0] += seconds

        def layer(**operands: Any) -> Tensor:
            later(1.0)
            y = mxref.parallel_linear_lora(**operands)
            y.register_hook(lambda gradient: later(10.0))
            return y

        draw = Workload.draw
        monkeypatch.setattr(Workload, "draw", lambda *arguments: (later(100.0), draw(*arguments))[1])
        assert first_call.first_step(TINY, CPU, Path("slow", "", layer), now=lambda: clock[0]) == 11.0


def test_ceilings() -> None:
    ceilings = measure_ceilings(FakeClock(), CPU, side=8, copy_bytes=64, samples=1)
    assert (ceilings.matmul, ceilings.copy) == (2 * 8**3, 128)
    assert Ceilings(2, 3).best(Ceilings(1, 4)) == Ceilings(2, 4)
    assert Ceilings(2, 3).drift(Ceilings(2, 4)) == pytest.approx(0.25)
