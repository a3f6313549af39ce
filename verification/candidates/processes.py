"""Child processes under supervision: a pool that starts them, hears what they say, and notices how they end.

A child may crash, loop without end, or wait for something that never comes. One that takes more processor time than it
has been given is ended, on a busy machine as on an idle one; and so is one that says nothing for too long while it uses
next to none. That may still be the machine's fault.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess, parent_process
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

WAITS = 0.01
"""A child that uses less than this part of the time waits; one that computes gets more even on a very busy machine."""
_TICK = 0.25
"""Seconds between two looks at children that say nothing."""
FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
"""Signals that a person or the out-of-memory killer sends; a process that goes wrong dies of others."""

T = TypeVar("T")
Method = Literal["fork", "spawn", "forkserver"]


@dataclass(frozen=True)
class Limits:
    """What a child may take before it says something again: seconds of processor time, and of waiting by the clock."""

    processor: float = math.inf
    silence: float = math.inf


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: its exit code, -n for signal n.
        over: the limit for which the pool ended it, or "".
        seconds: what it had taken of that limit.
        unread: why nobody could read one of its messages; what it sent behind that is lost.
    """

    code: int
    over: Literal["processor", "silence", ""] = ""
    seconds: float = 0.0
    unread: str = ""

    @property
    def well(self) -> bool:
        """Whether its work came to its end, and all that it said was heard."""
        return self.code == 0 and not self.over and not self.unread

    @property
    def from_outside(self) -> bool:
        """Whether the machine may be to blame: no time for the child, no memory, a person who ended it."""
        return self.over == "silence" or (not self.over and -self.code in FROM_OUTSIDE)

    def __str__(self) -> str:
        if self.over:
            by = "of processor time" if self.over == "processor" else "by the clock"
            return f"hung: it said nothing for {self.seconds:.0f} s {by} and was ended"
        if self.unread:
            return f"sent a message that cannot be read ({self.unread})"
        if self.code == -signal.SIGKILL:
            return "was killed (SIGKILL): by someone, or because memory ran out"
        if self.code < 0:
            return f"crashed ({signal.Signals(-self.code).name})"
        return f"ended itself with exit status {self.code}"


@dataclass(eq=False)
class Job(Generic[T]):
    """Work for one child.

    Attributes:
        about: whatever the caller wants to know it by.
        work: called in the child with a function that sends a message to the pool, and with `arguments`.
        limits: in force from now on; the caller may change them while the child runs.
        started: when its child was, by the monotonic clock.
    """

    about: T
    work: Callable[..., None]
    arguments: tuple[Any, ...] = ()
    limits: Limits = Limits()
    started: float = 0.0


@dataclass(eq=False)
class _Child(Generic[T]):
    job: Job[T]
    process: BaseProcess
    messages: Connection
    heard: float
    used: float = 0.0
    speaks: bool = True
    unread: str = ""


class Pool(Generic[T]):
    """Runs jobs, `size` at a time, each in a process of its own.

    Iterating gives a job and a message of its child, or how that ended, until no job is left. Jobs may be added
    meanwhile. Leaving the `with` statement ends all children.

    Args:
        size: processes at once.
        method: "fork" shares this process's memory, "spawn" nothing, "forkserver" what `preload` leaves there.
        preload: modules that the server imports, once for all its children; one that already runs is taken as it is.
    """

    def __init__(self, size: int, method: Method, preload: Sequence[str] = ()) -> None:
        self.waiting: deque[Job[T]] = deque()
        self._size, self._context = size, get_context(method)
        self._children: list[_Child[T]] = []
        if method == "forkserver":
            self._context.set_forkserver_preload([*preload])

    def __enter__(self) -> Pool[T]:
        return self

    def __exit__(self, *exception: object) -> None:
        for child in self._children:
            _end(child)

    def __iter__(self) -> Iterator[tuple[Job[T], Any]]:
        while self.waiting or self._children:
            while self.waiting and len(self._children) < self._size:
                self._children.append(self._start(self.waiting.popleft()))
            wait([child.messages for child in self._children if child.speaks], timeout=_TICK)
            for child in list(self._children):
                yield from self._listen(child)

    def _start(self, job: Job[T]) -> _Child[T]:
        receiver, sender = self._context.Pipe(duplex=False)
        arguments = (job.work, sender, job.arguments, dict(os.environ))
        process: BaseProcess = self._context.Process(target=_work, args=arguments, daemon=True)  # type: ignore[attr-defined]
        process.start()
        sender.close()
        job.started = time.monotonic()
        return _Child(job, process, receiver, job.started)

    def _listen(self, child: _Child[T]) -> Iterator[tuple[Job[T], Any]]:
        """What a child has said, and how it ended if it has."""
        alive = child.process.is_alive()  # asked first: what a child has sent before it died is there then
        for message in _drain(child):
            yield child.job, message
        over, seconds = _over_limit(child) if alive else ("", 0.0)
        if over or not alive:
            self._children.remove(child)
            code = _end(child)
            crashed = code < 0 and -code not in FROM_OUTSIDE  # before it was ended: to die takes processor time, too
            yield child.job, Ended(code, *(("", 0.0) if crashed else (over, seconds)), child.unread)


def _work(
    work: Callable[..., None], messages: Connection, arguments: tuple[Any, ...], environment: dict[str, str]
) -> None:
    begin(environment)
    work(messages.send, *arguments)


def begin(environment: dict[str, str]) -> None:
    """What a child does first: it will end with who asked for it, and has that one's environment, not a server's."""
    die_with_parent()
    if os.environ != environment:
        os.environ.clear()
        os.environ.update(environment)
    gc.freeze()  # what was there before the fork is nobody's garbage, and to look through it would copy its memory


def _drain(child: _Child[T]) -> list[Any]:
    """Everything that a child has said and nobody has heard."""
    messages = []
    try:
        while child.speaks and child.messages.poll():
            messages.append(child.messages.recv())
            child.heard, child.used = time.monotonic(), processor_seconds(child.process)
    except (EOFError, OSError):  # it has closed its end, or died within a message
        child.speaks = False
    except Exception as error:  # an object that cannot be made again here
        child.speaks, child.unread = False, f"{type(error).__name__}: {error}"
    return messages


def _over_limit(child: _Child[T]) -> tuple[Literal["processor", "silence", ""], float]:
    """The limit that a child exceeds, and what it has taken since it last said something."""
    limits = child.job.limits
    used, silent = processor_seconds(child.process) - child.used, time.monotonic() - child.heard
    if used > limits.processor:
        return "processor", used
    return ("silence", silent) if silent > limits.silence and used < WAITS * silent else ("", 0.0)


def _end(child: _Child[T]) -> int:
    """End a child, if it still runs, and give its exit code."""
    child.process.kill()
    child.process.join()
    child.messages.close()
    code = child.process.exitcode or 0
    child.process.close()
    return code


def cores() -> int:
    """How many of the machine's cores this process may use."""
    return len(os.sched_getaffinity(0))


def processor_seconds(process: BaseProcess) -> float:
    """What a child has used so far, all of its threads together; 0 once it has gone."""
    return _seconds(Path(f"/proc/{process.pid}/stat"))


def thread_seconds(process: BaseProcess) -> dict[str, float]:
    """What each thread of a child has used so far, by its number; empty once the child has gone."""
    return {thread.name: _seconds(thread / "stat") for thread in Path(f"/proc/{process.pid}/task").glob("*")}


def _seconds(stat: Path) -> float:
    try:
        text = stat.read_text()
    except OSError:
        return 0.0
    user, system = text.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def die_with_parent() -> None:
    """Linux ends this process when the one that asked for it is gone, however that came about."""
    asked_by, parent = parent_process(), os.getppid()
    if asked_by is not None and asked_by.pid != parent:  # a server forked it, which goes on as long as a child of it
        _die_when_closed(asked_by.sentinel)
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _die_when_closed(pipe: int) -> None:
    """The same when the other end of a pipe is closed."""
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if wait([pipe], timeout=0):
        os._exit(1)
