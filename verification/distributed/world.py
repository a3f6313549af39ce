"""A world of ranks, each a process: asked question by question, and ended when one of them dies or all of them wait.

The processes are forked from a server that has imported torch once. They meet in a file. What bounds them is progress:
ranks that owe an answer and use no processor time all wait for something that will not come; one that uses too much
computes without end. Neither depends on how busy the machine is.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mxref.verification.candidates.processes import WAITS, Ended, Limits, processor_seconds, thread_seconds
from mxref.verification.distributed.ranks import Raised, serve

__all__ = ["GRACE", "LIMITS", "Lost", "World", "innermost"]

LIMITS = Limits(processor=900.0, silence=30.0)
"""What a question may take: processor time of one rank, and time by the clock in which no rank that owes an answer does
anything. A rank that has nothing to wait for always does something."""
GRACE = 3.0
"""The latter, once a rank has died or raised: the others wait for it, or notice."""
GPU_GRACE = 30.0
"""The same where ranks wait for GPUs: that uses a processor, and so looks like work."""
_TICK = 0.1
_SERVER = get_context("forkserver")


@dataclass(frozen=True)
class Lost:
    """A rank that gave no answer: how it ended, in words, and where it was, the innermost frame first."""

    how: str
    trace: str = ""


@dataclass
class _Rank:
    process: BaseProcess
    connection: Connection


class World:
    """So many ranks, started when they are first asked; use it in a `with` statement.

    Args:
        size: how many.
        device_type: "cpu" (gloo), or "cuda" (NCCL, a GPU each).
        limits: see `LIMITS`.
        grace: see `GRACE`.

    Attributes:
        size: as given.
        failures: of questions so far; whoever judges the answers counts them.
    """

    def __init__(self, size: int, device_type: str = "cpu", limits: Limits = LIMITS, grace: float = GRACE) -> None:
        self.size, self._device_type, self._limits, self._grace = size, device_type, limits, grace
        self.failures = 0
        self._ranks: list[_Rank] = []
        self._folder: TemporaryDirectory[str] | None = None

    def __enter__(self) -> World:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def ask(self, questions: Sequence[Any]) -> list[Any]:
        """Each rank's answer to its question: what it returned, `Raised`, or `Lost`. After a loss the world has ended.

        The next questions then get a new one.
        """
        if not self._ranks:
            self._start()
        answers: dict[int, Any] = {}
        for number, question in enumerate(questions):
            try:
                self._ranks[number].connection.send_bytes(pickle.dumps(question))
            except OSError:  # it has died since its last answer
                self._ranks[number].process.join(timeout=GRACE)
                answers[number] = self._lost(number)
        watch = _Watch(self._ranks, self._limits, self._grace, GPU_GRACE if self._device_type == "cuda" else math.inf)
        while len(answers) < self.size:
            pending = [number for number in range(self.size) if number not in answers]
            wait([self._ranks[number].connection for number in pending], timeout=_TICK)
            for number in pending:
                self._listen(number, answers)
            owing = [number for number in pending if number not in answers]
            hung = watch.hung(owing, any(isinstance(answer, Lost | Raised) for answer in answers.values()))
            if hung:
                answers |= {number: Lost(hung[number], self._where(number)) for number in owing}
        if any(isinstance(answer, Lost) for answer in answers.values()):
            self.end()
        return [answers[number] for number in range(self.size)]

    def end(self) -> None:
        """End every rank."""
        for rank in self._ranks:
            rank.process.kill()
            rank.process.join()
            rank.connection.close()
        self._ranks = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        _SERVER.set_forkserver_preload(["mxref.verification.distributed.ranks"])
        self._folder = TemporaryDirectory()
        for number in range(self.size):
            ours, theirs = _SERVER.Pipe()
            arguments = (number, self.size, self._device_type, Path(self._folder.name), theirs, dict(os.environ))
            process = _SERVER.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._ranks.append(_Rank(process, ours))

    def _listen(self, number: int, answers: dict[int, Any]) -> None:
        """Take in what a rank says, or that it has ended."""
        rank = self._ranks[number]
        alive = rank.process.is_alive()  # asked first: what a rank has sent before it died is there then
        try:
            if rank.connection.poll():
                answers[number] = pickle.loads(rank.connection.recv_bytes())
                return
        except (EOFError, OSError):
            rank.process.join(timeout=GRACE)  # its end of the pipe is closed: it dies
            alive = False
        if not alive:
            answers[number] = self._lost(number)

    def _lost(self, number: int) -> Lost:
        """What is known of a rank that has ended itself."""
        return Lost(str(Ended(self._ranks[number].process.exitcode or 0)), self._read(number))

    def _where(self, number: int) -> str:
        """Where a rank is that says nothing: it is asked by a signal to write its stack down."""
        pid = self._ranks[number].process.pid
        if pid is not None and self._ranks[number].process.is_alive():
            os.kill(pid, signal.SIGUSR1)
            deadline = time.monotonic() + GRACE
            while not self._read(number) and time.monotonic() < deadline:
                time.sleep(_TICK / 10)
        return self._read(number)

    def _read(self, number: int) -> str:
        assert self._folder is not None
        file = Path(self._folder.name) / f"stack-{number}"
        return file.read_text(errors="replace").strip() if file.exists() else ""


class _Watch:
    """Whether ranks that owe an answer still do something."""

    def __init__(self, ranks: Sequence[_Rank], limits: Limits, grace: float, busy_grace: float = math.inf) -> None:
        self._processes, self._limits, self._grace = [rank.process for rank in ranks], limits, grace
        self._busy_grace, self._hopeless = busy_grace, math.inf
        self._first = [processor_seconds(process) for process in self._processes]
        self._marked = [thread_seconds(process) for process in self._processes]
        self._since = time.monotonic()

    def hung(self, owing: Sequence[int], hopeless: bool) -> dict[int, str]:
        """What to say of each rank that owes an answer, once none will give one; empty until then.

        `hopeless`: another rank has died or raised.
        """
        if not owing:
            return {}
        used = {number: processor_seconds(self._processes[number]) - self._first[number] for number in owing}
        if max(used.values()) > self._limits.processor:
            return {
                number: f"computed without end: no result in {seconds:.0f} s of processor time"
                if seconds > self._limits.processor else "waited meanwhile" for number, seconds in used.items()
            }  # fmt: skip
        clock = time.monotonic()
        self._hopeless = min(self._hopeless, clock) if hopeless else math.inf
        if clock - self._hopeless > self._busy_grace:
            return dict.fromkeys(owing, f"waited for its GPU, {self._busy_grace:.0f} s behind another rank's end")
        silent, limit = clock - self._since, self._limits.silence
        if silent < (min(self._grace, limit) if hopeless else limit):
            return {}
        now = [thread_seconds(process) for process in self._processes]
        if all(self._busiest(number, now[number]) < WAITS * silent for number in owing):
            return dict.fromkeys(owing, f"waited, and used no processor time for {silent:.0f} s")
        self._marked, self._since = now, time.monotonic()
        return {}

    def _busiest(self, number: int, now: dict[str, float]) -> float:
        """Seconds of the thread that has used most: many that only wake up now and then do nothing together either."""
        before = self._marked[number]
        return max((seconds - before.get(thread, 0.0) for thread, seconds in now.items()), default=0.0)


def innermost(trace: str) -> str:
    """Of a stack as faulthandler writes it, the innermost frame outside of torch and of Python: `file, line n in f`."""
    frames = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', trace)
    own = [frame for frame in frames if not re.search(r"/(torch|multiprocessing|site-packages)/", frame[0])]
    for path, line, function in own[:1]:
        return f"{Path(path).name}, line {line} in {function}"
    return ""
