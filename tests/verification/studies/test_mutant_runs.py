"""Mutants are judged: what kills one, what says nothing about it, and what survives."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from mutant_toys import CPU, SOURCES, a_finding, ask_toys, everything, fails, named, passes, setting, toy

from mxref.verification.candidates import processes
from mxref.verification.candidates.asking import once
from mxref.verification.candidates.processes import Limits
from mxref.verification.cases.scope import Scope
from mxref.verification.cases.small import smallest
from mxref.verification.checks.check import Asked, Check
from mxref.verification.checks.finding import Finding
from mxref.verification.checks.registry import CHECKS
from mxref.verification.gate.plan import Item, plan
from mxref.verification.studies.mutation import runner, session
from mxref.verification.studies.mutation.locate import Edit, locate
from mxref.verification.studies.mutation.mutant import Mutant
from mxref.verification.studies.mutation.questions import FOREIGN, questions
from mxref.verification.studies.mutation.runner import Outcome, Setting, run
from mxref.verification.studies.mutation.session import FalseKillError, Fate, judge
from mxref.verification.studies.mutation.sources import Place


def _crash(candidate: object) -> list[Finding]:
    ctypes.string_at(0)
    return []


def _spin(candidate: object) -> list[Finding]:
    """Use processor time in a loop that no signal ends, as a library that waits for a GPU, or an allocator."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while True:
        pass


def _for_processor_time(seconds: float) -> list[Finding]:
    begun = time.process_time()
    while time.process_time() - begun < seconds:
        pass
    return []


def _sleep(candidate: object) -> list[Finding]:
    time.sleep(3600)
    return []


def test_a_crash_and_a_loop_are_kills() -> None:
    """What is asked beside them is given more time than it takes on the busiest machine."""
    [crashed] = ask_toys([toy("crash", _crash), toy("next", passes)], matrix=True)
    assert (crashed.kills, crashed.unjudged, crashed.judged) == ({"crash": "crashed (SIGSEGV)"}, {}, ["crash", "next"])
    [hung] = ask_toys([toy("spin", _spin)], matrix=True, trial_seconds=0.5)
    assert (set(hung.kills), hung.unjudged, hung.judged) == ({"spin"}, {}, ["spin"])
    assert "of processor time" in hung.kills["spin"]


def test_a_question_that_is_long_for_the_sources_is_no_kill() -> None:
    """A machine may be so slow that the unmutated sources take longer than every question may."""
    slow = toy("slow", lambda _: _for_processor_time(0.8))
    [healthy] = ask_toys([slow])
    assert healthy.usual[slow.id] >= 0.8
    [mutant] = ask_toys([slow], [_swept()], trial_seconds=0.2, usual=healthy.usual)
    assert (mutant.kills, mutant.unjudged, mutant.judged) == ({}, {}, ["slow"])
    [hung] = ask_toys([slow], [_swept()], trial_seconds=0.2)
    assert "of processor time" in hung.kills["slow"]


def _end_soon(monkeypatch: pytest.MonkeyPatch, check: str, silence: float) -> None:
    """That check alone, and at once: what a child took before it fell silent would have to be 1 % of its waiting."""

    def limits(setting: Setting, item: Item, lenience: int = 1) -> Limits:
        return Limits(silence=silence) if item.checks[0].name == check else Limits()

    monkeypatch.setattr(Setting, "limits", limits)
    monkeypatch.setattr(processes, "WAITS", math.inf)


@pytest.mark.parametrize(("control", "hangs"), [(1.9, True), (2.1, False), (math.inf, False)])
def test_waiting_is_a_kill_only_where_the_sources_hardly_wait(
    control: float, hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its limit is 20 s of silence; 0.2 s here, after which the child is ended twice."""
    asked = []
    _end_soon(monkeypatch, "first", 0.2)
    monkeypatch.setattr(runner._Judge, "control", lambda _, part: asked.extend(part.checks) or control / 100)
    [outcome] = ask_toys([toy("first", _sleep), toy("next", passes)], [_swept()])
    assert asked == ["first"]
    told = outcome.kills if hangs else outcome.unjudged
    assert "by the clock" in told["first"]
    assert bool(outcome.kills) == hangs
    assert ("next" in outcome.judged) != hangs, "what is left is asked where nothing has killed it"


def test_the_control_is_the_unmutated_sources_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _end_soon(monkeypatch, "3", 0.2)
    judge_by = runner._Judge(setting(), tmp_path, lambda _: None)
    ways = [passes, fails, _crash, _sleep]
    asked = [toy(str(i), way) for i, way in enumerate(ways)]
    part = runner._Part(Outcome(named("sign bit lost")), asked, 1, tmp_path)
    seconds = []
    for part.at in range(len(ways)):
        seconds.append(judge_by.control(part))
    assert 0 <= seconds[0] < math.inf
    assert seconds[1:] == [math.inf] * 3


def test_a_mutant_that_somebody_ended_is_asked_again_alone(tmp_path: Path) -> None:
    def ended_at_first(candidate: object) -> list[Finding]:
        if not (tmp_path / "asked").exists():
            (tmp_path / "asked").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return [a_finding(False)]

    [outcome] = ask_toys([toy("toy", ended_at_first)])
    assert (set(outcome.kills), outcome.unjudged) == ({"toy"}, {})
    assert "a reason" in outcome.kills["toy"]


@pytest.mark.parametrize(
    ("line", "kills", "unjudged"),
    [
        ("raise NameError('gone')", {"import": "NameError: gone"}, {}),
        ("raise SyntaxError('no code')", {"import": "SyntaxError: no code"}, {}),
        ("raise MemoryError", {}, {"import": "ended itself with exit status 1"}),
        ("import os; os.abort()", {}, {"import": "crashed (SIGABRT)"}),
        (
            "import os; os.kill(os.getpid(), 9)",
            {},
            {"import": "was killed (SIGKILL): by someone, or because memory ran out"},
        ),
    ],
)
def test_only_an_exception_kills_while_importing(line: str, kills: dict[str, str], unjudged: dict[str, str]) -> None:
    judged = judge([_first_line(line)], [toy("toy", passes)], setting())
    [told] = judged.judged
    assert told.kills == kills
    assert (told.fate, told.reason) == (Fate.KILLED if kills else Fate.UNJUDGED, *(kills or unjudged).values())
    assert judged.exit_code == int(not kills)
    assert judged.passed is (True if kills else None)


def test_an_import_without_end_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_IMPORTING", Limits(processor=0.5))
    [told] = judge([_first_line("while True: pass")], [toy("toy", passes)], setting()).judged
    assert (told.fate, told.kills) == (Fate.UNJUDGED, {})
    assert told.reason.startswith("hung")


def _first_line(line: str) -> Mutant:
    """A mutant that does this when it is imported."""
    edit = Edit("NAN_BITS = ...", f"NAN_BITS = ...\n{line}")
    return locate(Place("device/decode.py"), edit, SOURCES, "does not import")


def test_the_unmutated_sources_are_judged_in_as_many_processes_as_there_are() -> None:
    """And what there was no time for is told apart from what was judged."""
    toys = [toy(name, passes) for name in ("first", "second")]
    mutant = named("bias twice")
    together = run([None, mutant], toys, setting(jobs=2), apart=True)
    assert [(outcome.mutant, outcome.judged) for outcome in together] == [
        (None, ["first"]), (None, ["second"]), (mutant, ["first", "second"]),
    ]  # fmt: skip
    session = judge([mutant], toys, setting(), seconds=0)
    assert [judged.fate for judged in session.judged] == [Fate.UNJUDGED]
    assert session.passed is None
    assert session.exit_code == 1


def test_a_stop_keeps_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was killed stays killed; who is alive may still be equivalent; who was not begun says so."""

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    alive = _swept()
    monkeypatch.setattr(session, "same_code", stop)
    told = judge([_first_line("raise NameError"), alive], [toy("toy", passes)], setting(), compile_survivors=True)
    assert [judged.fate for judged in told.judged] == [Fate.KILLED, Fate.UNJUDGED]
    assert told.judged[1].reason == "interrupted before it was judged to the end"
    told = judge([_first_line("raise NameError"), alive], [toy("toy", passes)], setting(), on_judged=stop)
    assert sorted(judged.fate for judged in told.judged) == [Fate.KILLED, Fate.UNJUDGED]
    assert told.passed is None


def test_survivors_of_an_earlier_run_are_compiled_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked about one whose code is the unmutated one's; what the compiler tells apart is asked again."""
    mutants = [mutant for mutant in everything() if not mutant.by_hand][:3]
    same, broken, other = (mutant.name for mutant in mutants)
    compiled: list[list[str]] = []

    def same_code(survivors: list[Mutant], *_: object) -> tuple[set[str], set[str]]:
        compiled.append([mutant.name for mutant in survivors])
        return {same}, {broken}

    asked: list[Outcome] = []
    monkeypatch.setattr(session, "same_code", same_code)
    told = judge(
        mutants, [toy("toy", passes)], setting(), compile_survivors=True, alive_before=[same, broken, other],
        on_judged=asked.append,
    )  # fmt: skip
    assert [judged.fate for judged in told.judged] == [Fate.EQUIVALENT, Fate.KILLED, Fate.SURVIVED]
    assert compiled == [[same, broken, other]], "once"
    assert [outcome.mutant.name for outcome in asked if outcome.mutant] == [other]


def test_the_matrix_asks_every_check_about_the_mutants_by_hand() -> None:
    toys = [toy("first", fails), toy("second", passes), toy("third", fails)]
    mutants = [named("bias twice"), _swept()]
    by_hand, swept = ask_toys(toys, mutants, matrix=True)
    assert (set(by_hand.kills), by_hand.judged) == ({"first", "third"}, ["first", "second", "third"])
    for outcome in [swept, *ask_toys(toys, mutants)]:
        assert (set(outcome.kills), outcome.judged) == ({"first"}, ["first"])


def test_a_mutant_is_asked_until_a_check_rejects_it_that_a_foreign_kernel_is_asked_too() -> None:
    names = ("tables", "interval", "addresses", "drift", "rows", "determinism")
    assert FOREIGN.intersection(names) == {"interval", "drift", "rows", "determinism"}
    ways = (fails, passes, fails, fails, passes, fails)
    [outcome] = ask_toys([toy(name, way) for name, way in zip(names, ways, strict=True)], [_swept()])
    assert [*outcome.kills] == ["tables", "drift"]
    assert outcome.judged == ["tables", "interval", "drift"]


def test_a_mutant_is_asked_what_runs_its_function() -> None:
    """What does not cannot notice; a function of the host may have prepared what a later question uses."""
    checks = [check for check in CHECKS if check.name in ("integer", "decoder", "activation")]
    items = [next(item for item in questions(CPU) if check in item.checks) for check in checks]
    [healthy] = run([None], items, setting(traced=True))
    ran = {item.checks[0].name: healthy.coverage[item.id] for item in items}
    assert Place("device/grouped_matmul.py", "grouped_matmul_kernel") in ran["integer"] - ran["decoder"]
    assert Place("device/activation.py", "sigmoids") in ran["activation"] - ran["integer"] - ran["decoder"]
    assert Place("device/dequant.py", "dequantize_kernel") in ran["decoder"]

    def asked(place: Place, **changes: Any) -> list[str]:
        mutant = next(m for m in everything() if m.place == place and m.by_hand == bool(changes))
        [outcome] = run([mutant], passing, setting(**changes), coverage=healthy.coverage)
        assert not outcome.kills, outcome
        return outcome.judged

    passing = [replace(item, checks=toy(item.checks[0].name, passes).checks) for item in items]
    assert [item.id for item in passing] == [item.id for item in items]
    everyone = [check.name for check in checks]
    assert asked(Place("device/activation.py", "sigmoids")) == ["activation"]
    assert asked(Place("device/activation.py", "activation_kernel"), matrix=True) == everyone
    assert asked(Place("device/grouped_matmul.py", "GroupedMatmul.__init__")) == everyone, "not jit"
    assert asked(Place("device/hopper_fragments.py", "fragments_tile")) == everyone, "nobody runs it"


def test_a_mutant_that_leaves_torch_changed_is_killed() -> None:
    def change(candidate: object) -> list[Finding]:
        torch.set_default_dtype(torch.float64)
        return [a_finding(True)]

    [outcome] = ask_toys([toy("toy", change)], [_swept()])
    assert [*outcome.kills] == ["state"]
    assert "state" in FOREIGN
    result = judge([], [toy("toy", passes)], setting())
    assert result.checks == ["toy", "state"]


def test_bits_that_could_not_be_computed_are_not_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(items: object) -> Item:
        return toy("bits", lambda candidate: 1 / 0)  # type: ignore[arg-type, return-value]

    monkeypatch.setattr(session, "bits", broken)
    monkeypatch.setattr(session, "arguments", lambda *_: {_swept().name: "an argument"})
    with pytest.raises(FalseKillError, match=r"give no results: \{'bits': 'toy: ZeroDivisionError"):
        judge([_swept()], [toy("toy", passes)], setting())


def _swept() -> Mutant:
    return next(mutant for mutant in everything() if not mutant.by_hand and not mutant.gpu_only)


def test_rejected_sources_stop_the_run() -> None:
    with pytest.raises(FalseKillError, match="check 'toy' rejects the unmutated sources"):
        judge([], [toy("toy", fails)], setting())


def test_a_declared_equivalent_must_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = locate(Place("device/decode.py"), Edit("2.0**126", "float(2**126)"), SOURCES, "respelt")
    harmful = named("bias twice")
    monkeypatch.setattr(session, "arguments", lambda *_: dict.fromkeys(("respelt", "bias twice"), "an argument"))
    case = smallest(torch.float32)
    blind = Check("blind", "Accepts everything.", Asked.OWN, lambda *_: [case], once, lambda *_: [a_finding(True)])
    result = judge([harmless, harmful], plan(Scope("small", "cpu"), own=True, checks=[blind]), setting())
    assert [judged.fate for judged in result.judged] == [Fate.EQUIVALENT, Fate.SURVIVED]
    assert result.exit_code == 1


def test_the_matrix_survives_a_crash() -> None:
    toys = [toy("first", fails), toy("second", _crash)]
    toys += [toy("third", fails), toy("fourth", passes)]
    told: list[Outcome] = []
    [outcome] = run([named("bias twice")], toys, setting(matrix=True), on_outcome=told.append)
    assert set(outcome.kills) == {"first", "second", "third"}
    assert outcome.judged == ["first", "second", "third", "fourth"]
    assert told == [outcome]
