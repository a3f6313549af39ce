"""The candidate's own process: make the candidate and the items from an order, ask, send findings."""

from __future__ import annotations

import faulthandler
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from mxref.verification.arithmetic.accumulation import Accumulation, default_accumulation
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.driver import wait_asleep
from mxref.verification.candidates.own_code import OwnCode
from mxref.verification.candidates.probe import runs_interpreted
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.clone import IS_CLONE, of_a_clone
from mxref.verification.gate.order import Order
from mxref.verification.gate.plan import Item, slopes_in
from mxref.verification.gate.result import describe_device
from mxref.verification.gate.run import judge


class Numbers:
    """Items' numbers, of which each process that shares this object takes the next.

    Args:
        numbers: ascending; they may go on behind the last item.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        context = get_context("spawn")
        self._numbers, self._given = numbers, context.Value("q", 0)
        self._ready = context.Value("q", sys.maxsize)

    def ready(self, items: int = sys.maxsize) -> None:
        """From now on the first `items` may be asked; before the first call all."""
        self._ready.value = items

    def taken(self, waiting: Callable[[], None]) -> Iterator[int]:
        """Take numbers one by one as their items are ready; `waiting` is called repeatedly meanwhile."""
        while True:
            with self._given.get_lock():
                at = self._given.value
                self._given.value += 1
            if at >= len(self._numbers):
                return
            while self._numbers[at] >= self._ready.value:
                waiting()
                time.sleep(0.1)
            yield self._numbers[at]


class Refused(ValueError):  # noqa: N818
    """The order cannot be carried out."""


@dataclass(frozen=True)
class ItemInfo:
    """One item: identifier, names of checks and case."""

    id: str
    checks: tuple[str, ...]
    case: str


@dataclass(frozen=True)
class Planned:
    """What the process found before it asked; `candidate` without its callables."""

    candidate: Candidate
    how: Accumulation
    device: str
    entries: list[ItemInfo]


@dataclass(frozen=True)
class Asking:
    """The candidate is asked; or, `compared`, has answered, and the reference is computed."""

    number: int
    compared: bool = False


@dataclass(frozen=True)
class Judged:
    """An item is done."""

    number: int
    findings: list[Finding]


@dataclass(frozen=True)
class Short:
    """An item could not be judged for want of GPU memory that other processes have."""

    number: int


@dataclass(frozen=True)
class Waiting:
    """The next item is not ready."""


@dataclass(frozen=True)
class Done:
    """No item is left for this process."""


@dataclass(frozen=True)
class Fault:
    """A fault that is not the candidate's."""

    what: str


@dataclass(frozen=True)
class Lost:
    """The process cannot go on."""

    reason: str


def elsewhere(**operands: Any) -> Any:
    """Stands in for a candidate's callables in other processes."""
    raise RuntimeError("the candidate's callables stay in its own process")


def work(send: Callable[[Any], None], order: Order, numbers: Numbers, sharing: int, crash: Path) -> None:
    """The items of these numbers, a message before and after each; a crash's traceback goes to `crash`.

    `sharing` processes run at once.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the asking process ends this one
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(max(torch.get_num_threads() // sharing, 1))  # processes share the machine
    with crash.open("w") as file:
        faulthandler.enable(file, all_threads=False)
        code = OwnCode.now()
        if order.device.type == "cuda" and sharing > 1:
            wait_asleep(order.device)  # others need the core
        try:
            candidate = order.candidate()
            interpreted = runs_interpreted(candidate, order.device)
            if interpreted and candidate.operators is not None and IS_CLONE:  # a foreign one may compile
                of_a_clone("candidates.own.interpret_only", "").interpret_only()
            items = order.items(candidate, interpreted)
        except ValueError as error:
            send(Refused(str(error)))
            return
        how = candidate.accumulation or default_accumulation(order.device)
        bare = replace(candidate, call=elsewhere, decode=None, configs=None, operators=None)
        entries = [ItemInfo(item.id, tuple(check.name for check in item.checks), item.name) for item in items]
        send(Planned(bare, how, describe_device(order.device, interpreted), entries))
        slopes = slopes_in(items)
        asked = replace(candidate, accumulation=None) if order.lenient else candidate
        ask = partial(judge, candidate=asked, how=how, slopes=slopes, code=code, shared_memory=sharing > 1)
        for number in takewhile(lambda number: number < len(items), numbers.taken(lambda: send(Waiting()))):
            if not _judge(send, number, items[number], ask, sharing > 1):
                return
            items[number] = replace(items[number])  # frees its sample
        send(Done())


def _judge(
    send: Callable[[Any], None], number: int, item: Item, ask: Callable[..., list[Finding]], shared: bool
) -> bool:
    """One item, and whether another can follow; our faults are told from the candidate's."""
    send(Asking(number))
    try:
        findings = ask(item, answered=lambda: send(Asking(number, compared=True)))
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # other processes want it
    except torch.AcceleratorError as error:  # the GPU answers this process no more
        send(Lost(f"its process could not go on: {str(error).splitlines()[0]}"))
        return False
    except Exception as error:
        if shared and isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            send(Short(number))
            return True
        send(Fault(f"{item.checks[0].name}, {item.name}: {type(error).__name__}: {error} ({_place(error)})"))
        findings = []
    except BaseException as error:  # SIGINT is ignored here: a candidate raised it
        raised = Finding(item.checks[0].name, item.name, "all", Status.FAIL, f"raised {type(error).__name__}", 0, 0)
        findings = [item.named(raised)]
    send(Judged(number, findings))
    return True


def _place(error: BaseException) -> str:
    """File and line of an error of ours."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return "" if frame is None else f"{Path(frame.tb_frame.f_code.co_filename).name}, line {frame.tb_lineno}"
