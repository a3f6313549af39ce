"""Small benchmarks with a clock that is none: what the tests of speed share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

import mxref
from mxref.verification.bench import timing
from mxref.verification.bench.benchmark import Bench, run_benchmark
from mxref.verification.bench.pairs import Effort
from mxref.verification.bench.paths import Path
from mxref.verification.bench.timing import Captured, Ceilings
from mxref.verification.bench.workloads import MEASURES, Shape

CPU = torch.device("cpu")
TINY = Shape("tiny", 4, 64, 32, 6, 2, rank=4)
SPARSE = Shape("sparse", 8, 64, 32, 3, 1, rank=4)
STEP, FORWARD, BASE, BASE_FORWARD, BASE_DX, DECODE = MEASURES
EFFORT = Effort(rounds=2, samples=4, seconds=1e9)
GOLDEN = Path("golden", "the golden model", mxref.parallel_linear_lora)


def golden_decoder(*, expert_weights: mxref.MXWeights, expert_offsets: Tensor, inputs: Tensor, **rest: Any) -> Tensor:
    active = torch.diff(expert_offsets, prepend=expert_offsets.new_zeros(1)) > 0
    return mxref.decode_mxfp4(expert_weights, inputs.dtype)[active]


DECODER = Path("decoder", "the golden decode", golden_decoder, parts=("decode",))


class FakeClock:
    """Captures everything; a call takes what `costs` says of the path that it runs, in turn."""

    def __init__(self, captures: bool = True) -> None:
        self.captures = captures
        self.calls: list[Any] = []
        self.inside = False

    @contextmanager
    def stream(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def sample(self, call: Callable[[], object], count: int) -> list[float]:
        self.calls.append(call)
        call()
        return [1.0 + 0.01 * i for i in range(count)]

    def capture(self, run: timing.Run) -> Captured | None:
        return Captured(lambda: None, run()) if self.captures else None

    def extra_bytes(self, run: timing.Run) -> int | None:
        run()
        return 1000


class WallClock:
    """Wall time on a CPU, where nothing is captured and memory is not counted."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def stream(self) -> AbstractContextManager[None]:
        """Nothing to choose."""
        return nullcontext()

    def sample(self, call: Callable[[], object], count: int) -> list[float]:
        """See `Clock`."""
        seconds = []
        for _ in range(count):
            begin = self._now()
            call()
            seconds.append(self._now() - begin)
        return seconds

    def capture(self, run: timing.Run) -> Captured | None:
        """None: there is nothing to capture into."""
        return None

    def extra_bytes(self, run: timing.Run) -> int | None:
        """None: not counted."""
        return None


def fixed_ceilings() -> Ceilings:
    return Ceilings(1e12, 1e11)


def green() -> Bench:
    return Bench("a test", [], EFFORT, commit="abc")


def timed(*paths: Path, captures: bool = True) -> Bench:
    return run_benchmark(green(), [TINY], paths, CPU, FakeClock(captures), fixed_ceilings)


def out_of_memory(**operands: Any) -> Tensor:
    raise torch.OutOfMemoryError("no room")
