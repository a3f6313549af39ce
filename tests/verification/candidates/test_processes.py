"""The pool of child processes: what it hears, and how it tells one end from another. No test asks how fast one is."""

from __future__ import annotations

import faulthandler
import operator
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import pytest

from mxref.verification.candidates.processes import Ended, Job, Limits, Pool

Send = Callable[[Any], None]


def speak(send: Send, *words: str) -> None:
    for word in words:
        send(word)


def leave(send: Send, code: int) -> None:
    send("before")
    os._exit(code)


def die(send: Send, number: int) -> None:
    faulthandler.disable()
    os.kill(os.getpid(), number)
    time.sleep(3600)


def spin(send: Send) -> None:
    """Use processor time where no signal but one is heard."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while True:
        pass


def wait(send: Send) -> None:
    time.sleep(3600)


def close_and_wait(send: Send) -> None:
    os.closerange(3, 256)
    time.sleep(3600)


class Unreadable:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return int, ("no number",)


def say_what_nobody_can_read(send: Send) -> None:
    send(Unreadable())


def _heard(job: Job[str], method: Literal["fork", "spawn"] = "fork") -> tuple[list[Any], Ended]:
    with Pool[str](1, method) as pool:
        pool.waiting.append(job)
        *messages, ended = [said for _, said in pool]
    assert isinstance(ended, Ended)
    return messages, ended


def test_all_that_a_child_says_is_heard() -> None:
    words = tuple(str(i) for i in range(1000))
    messages, ended = _heard(Job("", speak, words))
    assert messages == list(words)
    assert ended.well


def test_a_child_that_shares_nothing_is_heard() -> None:
    messages, ended = _heard(Job("", operator.call, ("word",)), "spawn")
    assert messages == ["word"]
    assert ended.well


def test_the_last_words_of_a_child_that_leaves_are_heard() -> None:
    messages, ended = _heard(Job("", leave, (3,)))
    assert messages == ["before"]
    assert (ended.code, ended.well, ended.from_outside, str(ended)) == (
        3,
        False,
        False,
        "ended itself with exit status 3",
    )


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL, signal.SIGTERM])
def test_a_crash_is_told_from_an_end_from_outside(number: signal.Signals) -> None:
    _, ended = _heard(Job("", die, (number,)))
    killed = number is signal.SIGKILL
    assert str(ended).startswith("was killed (SIGKILL): by someone" if killed else f"crashed ({number.name})")
    assert ended.from_outside == (number in (signal.SIGKILL, signal.SIGTERM))


def test_processor_time_ends_a_child_that_hears_no_signal() -> None:
    """However long that takes by the clock: a child that computes is not silent."""
    _, ended = _heard(Job("", spin, limits=Limits(processor=0.3, silence=0.01)))
    assert (ended.over, ended.from_outside) == ("processor", False)
    assert ended.seconds > 0.3


def test_a_crash_is_no_hang_however_long_the_system_takes_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies still uses processor time, and looks alive: its memory is given back first."""
    monkeypatch.setattr(BaseProcess, "is_alive", lambda process: process.join() or True)
    _, ended = _heard(Job("", die, (signal.SIGSEGV,), Limits(processor=-1)))
    assert str(ended) == "crashed (SIGSEGV)"


@pytest.mark.parametrize("work", [wait, close_and_wait])
def test_silence_ends_a_child_that_waits(work: Callable[[Send], None]) -> None:
    _, ended = _heard(Job("", work, limits=Limits(processor=60, silence=0.5)))
    assert (ended.over, ended.well, ended.from_outside) == ("silence", False, True)
    assert ended.seconds > 0.5


def test_a_message_that_nobody_can_read_is_told() -> None:
    messages, ended = _heard(Job("", say_what_nobody_can_read))
    assert messages == []
    assert (ended.code, ended.well, ended.from_outside) == (0, False, False)
    assert str(ended).startswith("sent a message that cannot be read (")


def test_limits_may_change_while_a_child_runs() -> None:
    def speak_and_wait(send: Send) -> None:
        send("now")
        time.sleep(3600)

    with Pool[str](1, "fork") as pool:
        pool.waiting.append(Job("", speak_and_wait))
        for job, said in pool:
            if isinstance(said, Ended):
                assert said.over == "silence"
            job.limits = Limits(silence=0.1)


def test_jobs_may_be_added_and_no_more_run_than_there_are_places(tmp_path: Path) -> None:
    def count(send: Send, name: str) -> None:
        (tmp_path / name).touch()
        send(len(list(tmp_path.iterdir())))
        (tmp_path / name).unlink()

    ended = []
    with Pool[int](2, "fork") as pool:
        pool.waiting.extend(Job(i, count, (str(i),)) for i in range(4))
        for job, said in pool:
            if isinstance(said, Ended):
                ended.append(job.about)
                if job.about == 0:
                    pool.waiting.append(Job(4, count, ("4",)))
            else:
                assert said <= 2
    assert sorted(ended) == list(range(5))


def test_leaving_ends_all_children() -> None:
    def say_who(send: Send) -> None:
        send(os.getpid())
        time.sleep(3600)

    with Pool[str](2, "fork") as pool:
        pool.waiting.extend(Job("", say_who) for _ in range(2))
        heard = (said for _, said in pool)
        pids = [next(heard), next(heard)]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
