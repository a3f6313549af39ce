"""Compiles what this project's kernels will start on a GPU, in as many processes as there are cores, while it judges.

The processes that judge would compile one kernel after the other, and the same ones at once. Here every item is asked
of tensors without memory, in the order in which they are judged, what it would start is recorded, and each kernel is
compiled once into Triton's cache; an item is judged when its kernels are there. What cannot be foreseen so, such as
what depends on a result, is compiled when it is met.
"""

from __future__ import annotations

import gc
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context
from threading import Thread
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime.jit import MockTensor

from mxref.kernels.compiled.units import Unit, units_of
from mxref.kernels.device import dequant, grouped_matmul, launch
from mxref.kernels.device.launch import Launch, generation, recording
from mxref.verification.candidates.asking import once
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.processes import cores, die_with_parent
from mxref.verification.candidates.shipped import shipped
from mxref.verification.cases.call import Saved
from mxref.verification.cases.case import Case
from mxref.verification.cases.draw import draw
from mxref.verification.gate.order import Order
from mxref.verification.gate.plan import Item, drawing
from mxref.verification.gate.process import Numbers


@contextmanager
def compiling_ahead(order: Order, numbers: Numbers) -> Iterator[None]:
    """Meanwhile compile for this machine's GPU what the shipped kernels start when they are asked for an order's items.

    An item waits for its kernels. One that does not compile is left to the process that judges, whose failure it is.
    """
    numbers.ready(0)
    process = get_context("spawn").Process(target=_apart, args=(order, this_gpu(), numbers))
    process.start()

    def nobody_waits() -> None:
        process.join()  # however it ended
        numbers.ready()

    ended = Thread(target=nobody_waits)
    ended.start()
    try:
        yield
    finally:
        process.kill()
        ended.join()


def _apart(order: Order, architecture: str, numbers: Numbers) -> None:
    """In a process that has no GPU, and so can have children that run backward passes: autograd would want the GPU."""
    die_with_parent()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    candidate = shipped(torch.device("cpu"))
    with suppress(ValueError):  # whoever judges says what is wrong with the order
        compile_items(candidate, order.items(candidate, interpreted=False), architecture, numbers.ready)


def compile_items(
    candidate: Candidate,
    items: Sequence[Item],
    architecture: str,
    ready: Callable[[int], None] = lambda items: None,
    jobs: int | None = None,
) -> None:
    """The same for given items and a GPU by its compute capability, such as "sm_90".

    Args:
        candidate: the shipped kernels, on a CPU and not interpreted.
        items: of a plan for a GPU.
        architecture: the GPU.
        ready: told of how many items, from the first, all kernels are compiled.
        jobs: processes; None for one a core.
    """
    jobs, left, done, seen = jobs or cores(), iter(range(len(items))), 0, set[tuple[str, str, str]]()
    compilations = deque[list[Future[None]]]()
    with (
        suppress(BrokenProcessPool),
        ProcessPoolExecutor(jobs, get_context("fork"), _share, (candidate, items, architecture)) as pool,
    ):
        recordings = deque(pool.submit(_units, number) for number in islice(left, jobs))
        while recordings:
            recordings.extend(pool.submit(_units, number) for number in islice(left, 1))
            new = {(unit.module, unit.kernel, unit.key): unit for unit in recordings.popleft().result()}
            compilations.append([pool.submit(warm_cache, unit) for key, unit in new.items() if key not in seen])
            seen |= new.keys()
            while compilations and all(each.done() for each in compilations[0]):
                compilations.popleft()
                ready(done := done + 1)
        for each in compilations:
            wait(each)
            ready(done := done + 1)


def this_gpu() -> str:
    """The current GPU by its compute capability, such as "sm_90"."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def launches_of(candidate: Candidate, item: Item, architecture: str) -> list[Launch]:
    """What this project's kernels start for an item on a GPU, recorded from operands without memory.

    A way of asking that goes on by a result's values ends at the first, so that each is also asked once, plainly.
    """
    sample = _without_memory(item)
    with recording(generation(int(architecture.removeprefix("sm_")))) as recorder, _aligning():
        asks: tuple[Callable[..., object], ...] = (once, item.checks[0].ask)
        for ask in dict.fromkeys(asks):  # most checks ask once and no more
            with suppress(Exception):
                ask(candidate, sample)
    return [replace(launch, arguments=_placed(launch.arguments)) for launch in recorder.launches]


def _placed(arguments: dict[str, Any]) -> dict[str, Any]:
    """A launch's arguments, tensors by dtype and address: for multiples of 16 bytes Triton compiles other code."""
    return {name: _Placed(x.dtype, _behind(x)) if isinstance(x, Tensor) else x for name, x in arguments.items()}


class _Placed(MockTensor):  # type: ignore[misc]  # Triton's has no types
    """All that Triton reads of a tensor before it compiles."""

    def __init__(self, dtype: torch.dtype, address: int) -> None:
        super().__init__(dtype)
        self._address = address

    def data_ptr(self) -> int:
        """The address."""
        return self._address


def _behind(x: Tensor) -> int:
    """How many bytes behind a multiple of 16 a tensor without memory begins: its storage would begin at one."""
    return int(x.storage_offset()) * x.element_size() % 16


@contextmanager
def _aligning() -> Iterator[None]:
    """Copies what begins between multiples of 16 bytes where kernels want it so, as of tensors with memory."""

    def aligned(x: Tensor) -> Tensor:
        return x.clone() if _behind(x) else x

    with ExitStack() as patches:
        for module in (launch, grouped_matmul, dequant):
            patches.enter_context(patch.object(module, "aligned", aligned))
        yield


def _without_memory(item: Item) -> Any:
    """The item's sample on the meta device, to be asked of our kernels alone: there is no autocast there.

    What records sees its own thread alone. Whether indices are laid out as one that repeats depends on their values;
    no kernel is compiled for that.
    """
    case = item.case
    if isinstance(case, Case):  # whose values are looked at when it is drawn, and integers are drawn more than once
        data = "balanced" if case.data in ("integer", "rounded") else case.data
        call = case.call
        saved: Saved = "copied" if call.saved == "copied" else "kept"
        ids, ends = ("contiguous" if each == "expanded" else each for each in (call.ids, call.ends))
        call = replace(
            call, saved=saved, autocast="off", algorithms="any", default_dtype=torch.float32, default_device="",
            threads="one", ids=ids, ends=ends,
        )  # fmt: skip
        return draw(replace(case, data=data, call=call), seed=item.seed).to("meta")
    return drawing(case, torch.device("meta"), item.seed)()


_shared: tuple[Candidate, Sequence[Item], str]
"""In a process of the pool: whom to ask what, compiled for which GPU."""


def _share(*shared: Any) -> None:
    global _shared
    die_with_parent()
    os.nice(10)  # who judges goes first
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)  # a compiler leaves little garbage: looking for it takes an eighth of the time
    _shared = shared
    torch.set_num_threads(1)


def _units(number: int) -> list[Unit]:
    """The compilations of an item."""
    candidate, items, architecture = _shared
    launches = launches_of(candidate, items[number], architecture)
    return list(units_of(architecture, (("", launch) for launch in launches)))


def warm_cache(unit: Unit) -> None:
    """Compile it into Triton's cache, if it compiles."""
    with suppress(Exception):
        unit.build()
