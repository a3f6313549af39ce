"""Compiles what this project's kernels will start on a GPU, in as many processes as there are cores, before it judges.

The processes that judge would compile one kernel after the other. Here every item is asked of tensors without memory,
what it would start is recorded, and each kernel is compiled once into Triton's cache. What cannot be foreseen so, such
as what depends on a result, is compiled when it is met.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from mxref.kernels.compiled.units import Unit, units_of
from mxref.kernels.device.launch import Launch, generation, recording
from mxref.verification.candidates.answer import Answer
from mxref.verification.candidates.asking import once, under_every_configuration
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.processes import die_with_parent
from mxref.verification.candidates.shipped import shipped
from mxref.verification.cases.case import Case, Sample
from mxref.verification.cases.draw import draw
from mxref.verification.gate.order import Order
from mxref.verification.gate.plan import Item

_LARGEST = 2**22
"""Elements of weights or rows beyond which a draw takes longer than the compilation of what only it would show."""


def compile_ahead(order: Order, on_kernel: Callable[[int, int], None] = lambda done, known: None) -> None:
    """Compile for this machine's GPU what the shipped kernels start when they are asked for an order's items.

    A kernel that does not compile is left to the process that judges, whose failure it is.

    Args:
        order: of the shipped kernels, on a GPU.
        on_kernel: told how many kernels are compiled, and how many are to be, after each.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_apart, args=(order, this_gpu(), sender))
    process.start()
    sender.close()
    try:
        with suppress(EOFError):
            while True:
                on_kernel(*receiver.recv())
    finally:
        process.kill()
        process.join()


def _apart(order: Order, architecture: str, sender: Connection) -> None:
    """In a process that has no GPU, and so can have children that run backward passes: autograd would want the GPU."""
    die_with_parent()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    candidate = shipped(torch.device("cpu"))
    with suppress(ValueError):  # whoever judges says what is wrong with the order
        items = order.items(candidate, interpreted=False)
        compile_items(candidate, items, architecture, lambda done, known: sender.send((done, known)))


def compile_items(
    candidate: Candidate,
    items: Sequence[Item],
    architecture: str,
    on_kernel: Callable[[int, int], None] = lambda done, known: None,
    jobs: int | None = None,
) -> None:
    """The same for given items and a GPU by its compute capability, such as "sm_90".

    Args:
        candidate: the shipped kernels, on a CPU and not interpreted.
        items: of a plan for a GPU.
        architecture: the GPU.
        on_kernel: as in `compile_ahead`.
        jobs: processes; None for one a core.
    """
    units = dict[tuple[str, str, str], Unit]()
    shared = candidate, items, architecture
    with (
        suppress(BrokenProcessPool),
        ProcessPoolExecutor(jobs or os.cpu_count(), get_context("fork"), _share, shared) as pool,
    ):
        for found in pool.map(_units, range(len(items)), chunksize=8):
            units |= {(unit.module, unit.kernel, unit.key): unit for unit in found}
        for done, _ in enumerate(pool.map(_compile, _longest_first(units.values())), 1):
            on_kernel(done, len(units))


def this_gpu() -> str:
    """The current GPU by its compute capability, such as "sm_90"."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def launches_of(
    candidate: Candidate,
    case: Case,
    architecture: str,
    ask: Callable[[Candidate, Sample], list[Answer]] = once,
) -> list[Launch]:
    """What this project's kernels start for a case on a GPU, recorded from operands without memory."""
    call = replace(case.call, context="plain")  # there is no autocast of what has no memory, and no other kernel
    sample = draw(replace(case, call=call)).to("meta")
    with recording(generation(int(architecture.removeprefix("sm_")))) as recorder:
        ask(candidate, sample)
    return recorder.launches


_shared: tuple[Candidate, Sequence[Item], str]
"""In a process of the pool: whom to ask what, compiled for which GPU."""


def _share(*shared: Any) -> None:
    global _shared
    die_with_parent()
    _shared = shared
    torch.set_num_threads(1)


def _units(number: int) -> list[Unit]:
    """The compilations of an item that is asked once, or under every configuration."""
    candidate, items, architecture = _shared
    item, case = items[number], items[number].case
    if not isinstance(case, Case) or max(case.experts * case.K * case.N, case.rows * max(case.K, case.N)) > _LARGEST:
        return []
    ask = under_every_configuration if item.checks[0].ask is under_every_configuration else once
    launches = launches_of(candidate, case, architecture, ask)
    return list(units_of(architecture, (("", launch) for launch in launches)))


def _compile(unit: Unit) -> None:
    with suppress(Exception):
        unit.build()


def _longest_first(units: Iterable[Unit]) -> list[Unit]:
    """Gluon's kernels take several times as long."""
    return sorted(units, key=lambda unit: not unit.function.is_gluon())
