"""A world of ranks: answers, and every way in which a rank can keep one back. Nothing here waits for a clock alone."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from ranks_questions import Ask
from torch import distributed

from mxref.verification.candidates.processes import Limits
from mxref.verification.distributed import world as world_module
from mxref.verification.distributed.questions import NCCL_TIMEOUT, Groups, Place
from mxref.verification.distributed.ranks import Raised
from mxref.verification.distributed.world import GRACE, Lost, World, innermost


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(3, limits=Limits(processor=60.0, silence=2.0)) as world:
        yield world


def ask(world: World, what: str) -> list[object]:
    return world.ask([Ask(what)] * 3)


def test_ranks_answer_again_and_again(world: World) -> None:
    assert ask(world, "") == [3.0, 3.0, 3.0]
    assert ask(world, "") == [3.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("exits", "ended itself with exit status 0"),
        ("is_killed", "was killed (SIGKILL)"),
        ("faults", "crashed (SIGSEGV)"),
    ],
)
def test_a_rank_that_dies_is_named_and_the_next_question_gets_a_new_world(world: World, what: str, how: str) -> None:
    answers = ask(world, what)
    assert isinstance(answers[1], Lost)
    assert answers[1].how.startswith(how)
    assert all(isinstance(answers[rank], Lost | Raised) for rank in (0, 2))
    assert ask(world, "") == [3.0, 3.0, 3.0]


def test_a_rank_that_died_after_its_answer_is_named(world: World) -> None:
    ask(world, "")
    world._ranks[1].process.kill()
    world._ranks[1].process.join()
    answers = ask(world, "")
    assert isinstance(answers[1], Lost)
    assert answers[1].how.startswith("was killed (SIGKILL)")
    assert ask(world, "") == [3.0, 3.0, 3.0]


def test_ranks_that_wait_for_one_that_has_gone_on_say_where(world: World) -> None:
    answers = ask(world, "returns")
    assert answers[1] == "early"
    for rank in (0, 2):
        lost = answers[rank]
        assert isinstance(lost, Lost)
        assert lost.how.startswith("waited")
        assert "all_reduce" in lost.trace
        assert innermost(lost.trace).startswith("ranks_questions.py, line")


def test_what_a_rank_raises_is_told(world: World) -> None:
    answers = ask(world, "raises")
    assert isinstance(answers[1], Raised)
    assert answers[1].what == "ValueError: three is too many"
    assert "ranks_questions.py" in answers[1].trace
    assert all(isinstance(answers[rank], Lost) for rank in (0, 2))


def test_an_answer_that_cannot_be_sent_is_an_error_of_that_rank(world: World) -> None:
    assert isinstance(ask(world, "returns_what_nobody_can_send")[1], Raised)


def test_a_rank_that_computes_without_end_is_named() -> None:
    with World(2, limits=Limits(processor=3.0, silence=60.0)) as world:
        first, second = world.ask([Ask("spins")] * 2)
    assert isinstance(second, Lost)
    assert second.how.startswith("computed without end")
    assert isinstance(first, Lost)
    assert first.how == "waited meanwhile"


def test_a_rank_that_takes_its_time_is_waited_for() -> None:
    """However slow the machine is: what counts is that it computes."""
    with World(2, limits=Limits(processor=60.0, silence=0.5)) as world:
        assert world.ask([Ask("computes")] * 2) == [1.0, "late"]


def test_ranks_that_wait_for_their_gpu_are_not_waited_for_once_another_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are busy, as NCCL waits."""
    passed = iter(range(0, 1000, 4))
    monkeypatch.setattr(world_module, "time", SimpleNamespace(monotonic=lambda: next(passed)))
    used = iter(range(0, 1000, 4))
    monkeypatch.setattr(world_module, "thread_seconds", lambda process: {"0": next(used)})
    monkeypatch.setattr(world_module, "processor_seconds", lambda process: 0.0)
    rank = SimpleNamespace(process=None)
    watch = world_module._Watch([rank], Limits(processor=60.0, silence=1.0), GRACE, busy_grace=30.0)  # type: ignore[list-item]
    assert not any(watch.hung([0], hopeless=False) for _ in range(20))
    found = [watch.hung([0], hopeless=True) for _ in range(10)]
    assert [bool(each) for each in found].index(True) == 4
    assert found[-1][0].startswith("waited for its GPU")


@pytest.mark.parametrize(("busiest", "hung"), [(0.0, True), (0.5, False)])
def test_threads_that_only_wake_up_do_nothing_together(
    monkeypatch: pytest.MonkeyPatch, busiest: float, hung: bool
) -> None:
    """Each process group has some, and there may be many groups."""
    passed = iter([0.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(world_module, "time", SimpleNamespace(monotonic=lambda: next(passed)))
    threads: dict[str, float] = dict.fromkeys(map(str, range(100)), 0.0)
    monkeypatch.setattr(world_module, "thread_seconds", lambda process: dict(threads))
    monkeypatch.setattr(world_module, "processor_seconds", lambda process: sum(threads.values()))
    watch = world_module._Watch([SimpleNamespace(process=None)], Limits(processor=60.0, silence=1.0), GRACE)  # type: ignore[list-item]
    threads |= dict.fromkeys(threads, 0.01) | {"0": busiest}
    assert bool(watch.hung([0], hopeless=False)) == hung


def test_collectives_of_groups_on_gpus_end_as_those_of_the_world_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group has a timeout of its own, by default NCCL's ten minutes."""
    seen: list[object] = []
    monkeypatch.setattr(distributed, "new_group", lambda ranks, timeout: seen.append((ranks, timeout)))
    for device in ("cuda:0", "cpu"):
        Place(0, torch.device(device), {}).group(Groups(((0,), (1,))))
    assert seen == [([0], NCCL_TIMEOUT), ([1], NCCL_TIMEOUT), ([0], None), ([1], None)]
