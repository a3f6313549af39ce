"""Clocks: seconds that one call takes on a GPU, by CUDA events; and a machine's ceilings.

Nothing here knows what is timed. A clock samples a callable, captures it as a CUDA graph where that is possible, and
tells how much memory it takes beyond what was there. Allocation stays outside the timed window: a graph has its memory
from the capture on, and an eager call finds the allocator's cache warm.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

Run = Callable[[], Sequence[Tensor]]
"""What is timed: a call without arguments; it returns its results."""

_FLUSH = 256 << 20
"""Bytes written before every sample: several times any L2 so far, and long enough to hide a graph's launch."""


@dataclass(frozen=True, eq=False)
class Captured:
    """A call recorded once and replayed: `replay` computes again into the same `outputs`."""

    replay: Callable[[], None]
    outputs: Sequence[Tensor]


class Clock(Protocol):
    """Samples a callable on one device."""

    def stream(self) -> AbstractContextManager[None]:
        """Within it, work goes to the one stream that `capture` records from.

        Autograd's backward runs on its forward's stream, so a backward that is to be captured alone needs its forward
        here too.
        """
        ...

    def sample(self, call: Callable[[], object], count: int) -> list[float]:
        """Seconds of `count` calls, each with a cold L2."""
        ...

    def capture(self, run: Run) -> Captured | None:
        """The call as a graph; None where it cannot be captured, because it synchronises, for instance."""
        ...

    def extra_bytes(self, run: Run) -> int | None:
        """The most memory that one call holds beyond what was allocated before it and the results it returns."""
        ...


class EventClock:
    """Device time by CUDA events. An eager sample includes the gaps in which the GPU waits for the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.empty(_FLUSH, dtype=torch.int8, device=device)
        self._stream: Any = cast(Any, torch.cuda.Stream)(device)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """See `Clock`; what lies before it and after it in the caller's stream stays in that order."""
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            caller.wait_stream(self._stream)

    def sample(self, call: Callable[[], object], count: int) -> list[float]:
        """See `Clock`."""
        new: Callable[..., Any] = torch.cuda.Event
        events = [(new(enable_timing=True), new(enable_timing=True)) for _ in range(count)]
        for begin, end in events:
            self._flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize(self._device)
        return [begin.elapsed_time(end) / 1e3 for begin, end in events]

    def capture(self, run: Run) -> Captured | None:
        """See `Clock`. Autograd's backward runs on the forward's stream, so that both can be captured, or it alone.

        What synchronises is found out before the capture: one that fails half-way can leave the allocator unusable.
        """
        if self._synchronises(run):
            return None
        with self.stream():
            for _ in range(2):
                run()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                outputs = run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            torch.cuda.synchronize(self._device)
            return None
        return Captured(graph.replay, outputs)

    def _synchronises(self, run: Run) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the mode calls itself a prototype
            torch.cuda.set_sync_debug_mode("error")
            try:
                run()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                return True
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize(self._device)
        return False

    def extra_bytes(self, run: Run) -> int | None:
        """See `Clock`; as PyTorch's allocator counts. What the call saves for a backward pass is a part of it."""
        torch.cuda.synchronize(self._device)
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        results = run()
        torch.cuda.synchronize(self._device)
        grown = torch.cuda.memory_allocated(self._device) - before
        returned = min(_stored_bytes(results), grown)  # results that were there before are in neither
        return torch.cuda.max_memory_allocated(self._device) - before - returned


def _stored_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the storages that the tensors lie in, each counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached in this very run.

    Attributes:
        matmul: FLOP/s of a dense bf16 product.
        copy: bytes/s of a device copy, bytes read and bytes written both counted.
    """

    matmul: float
    copy: float

    def seconds(self, flops: float, octets: float) -> float:
        """The least time for so much arithmetic and so many bytes: whichever takes longer."""
        return max(flops / self.matmul, octets / self.copy)

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of each."""
        return Ceilings(max(self.matmul, other.matmul), max(self.copy, other.copy))

    def drift(self, other: Ceilings) -> float:
        """The larger relative distance of the two: how much the machine itself moved between two measurements."""
        return max(abs(self.matmul / other.matmul - 1), abs(self.copy / other.copy - 1))


def measure_ceilings(
    clock: Clock, device: torch.device, side: int = 8192, copy_bytes: int = 2 << 30, samples: int = 20
) -> Ceilings:
    """Time a product of two random [side, side] matrices and a copy of `copy_bytes`; medians.

    Random numbers matter: on zeros the tensor cores draw less power and clock higher.
    """
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=draw, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randint(0, 256, (copy_bytes,), generator=draw, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)

    def seconds(call: Callable[[], object]) -> float:
        clock.sample(call, 3)
        return statistics.median(clock.sample(call, samples))

    matmul = 2 * side**3 / seconds(lambda: torch.mm(a, b, out=product))
    return Ceilings(matmul, 2 * copy_bytes / seconds(lambda: target.copy_(source)))
