"""Mutants are judged: what kills one, what says nothing about it, and what survives."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from mxref.verification.candidates import processes
from mxref.verification.candidates.asking import once
from mxref.verification.candidates.processes import Limits
from mxref.verification.cases.draw import draw
from mxref.verification.cases.own.tables import TableCase, TableSample
from mxref.verification.cases.scope import Scope
from mxref.verification.cases.small import drawn_cases, smallest
from mxref.verification.checks.check import Asked, Check
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.checks.registry import CHECKS
from mxref.verification.gate.plan import Item, plan
from mxref.verification.studies.mutation import compiled, runner, session
from mxref.verification.studies.mutation.catalogue import catalogue, stratified
from mxref.verification.studies.mutation.locate import Edit, locate
from mxref.verification.studies.mutation.mutant import Mutant
from mxref.verification.studies.mutation.questions import FOREIGN, questions
from mxref.verification.studies.mutation.runner import Outcome, Setting, run
from mxref.verification.studies.mutation.session import FalseKillError, Fate, judge
from mxref.verification.studies.mutation.sources import Place, read_sources

SOURCES = read_sources()
CPU = torch.device("cpu")


@cache
def everything() -> list[Mutant]:
    return catalogue(SOURCES)


def _finding(ok: bool) -> Finding:
    return Finding("", "case", "Y", Status.PASS if ok else Status.FAIL, "a reason", 1, int(not ok))


def passes(candidate: object) -> list[Finding]:
    return [_finding(True)]


def fails(candidate: object) -> list[Finding]:
    return [_finding(False)]


def _item(name: str, way: Callable[[object], list[Finding]]) -> Item:
    """A question whose check finds what `way` returns."""
    ask: Any = lambda candidate, _: way(candidate)  # noqa: E731
    compare: Any = lambda found, _: list(found)  # noqa: E731
    check = Check(name, "A toy.", Asked.OWN, lambda *_: [], ask, compare)
    case = TableCase("toy", 0, ())
    return Item((check,), case, lambda: TableSample(case, CPU))


def _named(name: str) -> Mutant:
    return next(mutant for mutant in everything() if mutant.name == name)


def _setting(**changes: Any) -> Setting:
    return replace(Setting(SOURCES, CPU), **changes)


def _ask(toys: Sequence[Item], mutants: Sequence[Mutant | None] = (None,), **changes: Any) -> list[Outcome]:
    return run(mutants, toys, _setting(**changes))


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
    [crashed] = _ask([_item("crash", _crash), _item("next", passes)], matrix=True)
    assert (crashed.kills, crashed.unjudged, crashed.judged) == ({"crash": "crashed (SIGSEGV)"}, {}, ["crash", "next"])
    [hung] = _ask([_item("spin", _spin)], matrix=True, trial_seconds=0.5)
    assert (set(hung.kills), hung.unjudged, hung.judged) == ({"spin"}, {}, ["spin"])
    assert "of processor time" in hung.kills["spin"]


def test_a_question_that_is_long_for_the_sources_is_no_kill() -> None:
    """A machine may be so slow that the unmutated sources take longer than every question may."""
    slow = _item("slow", lambda _: _for_processor_time(0.8))
    [healthy] = _ask([slow])
    assert healthy.usual[slow.id] >= 0.8
    [mutant] = _ask([slow], [_swept()], trial_seconds=0.2, usual=healthy.usual)
    assert (mutant.kills, mutant.unjudged, mutant.judged) == ({}, {}, ["slow"])
    [hung] = _ask([slow], [_swept()], trial_seconds=0.2)
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
    [outcome] = _ask([_item("first", _sleep), _item("next", passes)], [_swept()])
    assert asked == ["first"]
    told = outcome.kills if hangs else outcome.unjudged
    assert "by the clock" in told["first"]
    assert bool(outcome.kills) == hangs
    assert ("next" in outcome.judged) != hangs, "what is left is asked where nothing has killed it"


def test_the_control_is_the_unmutated_sources_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _end_soon(monkeypatch, "3", 0.2)
    judge_by = runner._Judge(_setting(), tmp_path, lambda _: None)
    ways = [passes, fails, _crash, _sleep]
    asked = [_item(str(i), way) for i, way in enumerate(ways)]
    part = runner._Part(Outcome(_named("sign bit lost")), asked, 1, tmp_path)
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
        return [_finding(False)]

    [outcome] = _ask([_item("toy", ended_at_first)])
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
    judged = judge([_first_line(line)], [_item("toy", passes)], _setting())
    [told] = judged.judged
    assert told.kills == kills
    assert (told.fate, told.reason) == (Fate.KILLED if kills else Fate.UNJUDGED, *(kills or unjudged).values())
    assert judged.exit_code == int(not kills)
    assert judged.passed is (True if kills else None)


def test_an_import_without_end_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_IMPORTING", Limits(processor=0.5))
    [told] = judge([_first_line("while True: pass")], [_item("toy", passes)], _setting()).judged
    assert (told.fate, told.kills) == (Fate.UNJUDGED, {})
    assert told.reason.startswith("hung")


def _first_line(line: str) -> Mutant:
    """A mutant that does this when it is imported."""
    edit = Edit("NAN_BITS = ...", f"NAN_BITS = ...\n{line}")
    return locate(Place("device/decode.py"), edit, SOURCES, "does not import")


def test_the_unmutated_sources_are_judged_in_as_many_processes_as_there_are() -> None:
    """And what there was no time for is told apart from what was judged."""
    toys = [_item(name, passes) for name in ("first", "second")]
    mutant = _named("bias twice")
    together = run([None, mutant], toys, _setting(jobs=2), apart=True)
    assert [(outcome.mutant, outcome.judged) for outcome in together] == [
        (None, ["first"]), (None, ["second"]), (mutant, ["first", "second"]),
    ]  # fmt: skip
    session = judge([mutant], toys, _setting(), seconds=0)
    assert [judged.fate for judged in session.judged] == [Fate.UNJUDGED]
    assert session.passed is None
    assert session.exit_code == 1


def test_a_stop_keeps_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was killed stays killed; who is alive may still be equivalent; who was not begun says so."""

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    alive = _swept()
    monkeypatch.setattr(session, "same_code", stop)
    told = judge([_first_line("raise NameError"), alive], [_item("toy", passes)], _setting(), compile_survivors=True)
    assert [judged.fate for judged in told.judged] == [Fate.KILLED, Fate.UNJUDGED]
    assert told.judged[1].reason == "interrupted before it was judged to the end"
    told = judge([_first_line("raise NameError"), alive], [_item("toy", passes)], _setting(), on_judged=stop)
    assert sorted(judged.fate for judged in told.judged) == [Fate.KILLED, Fate.UNJUDGED]
    assert told.passed is None


def test_the_matrix_asks_every_check_about_the_mutants_by_hand() -> None:
    toys = [_item("first", fails), _item("second", passes), _item("third", fails)]
    mutants = [_named("bias twice"), _swept()]
    by_hand, swept = _ask(toys, mutants, matrix=True)
    assert (set(by_hand.kills), by_hand.judged) == ({"first", "third"}, ["first", "second", "third"])
    for outcome in [swept, *_ask(toys, mutants)]:
        assert (set(outcome.kills), outcome.judged) == ({"first"}, ["first"])


def test_a_mutant_is_asked_until_a_check_rejects_it_that_a_foreign_kernel_is_asked_too() -> None:
    names = ("tables", "interval", "addresses", "drift", "rows", "determinism")
    assert FOREIGN.intersection(names) == {"interval", "drift", "rows", "determinism"}
    ways = (fails, passes, fails, fails, passes, fails)
    [outcome] = _ask([_item(name, way) for name, way in zip(names, ways, strict=True)], [_swept()])
    assert [*outcome.kills] == ["tables", "drift"]
    assert outcome.judged == ["tables", "interval", "drift"]


def test_a_mutant_is_asked_what_runs_its_function() -> None:
    """What does not cannot notice; a function of the host may have prepared what a later question uses."""
    checks = [check for check in CHECKS if check.name in ("integer", "decoder", "activation")]
    items = [next(item for item in questions(CPU) if check in item.checks) for check in checks]
    [healthy] = run([None], items, _setting(traced=True))
    ran = {item.checks[0].name: healthy.coverage[item.id] for item in items}
    assert Place("device/grouped_matmul.py", "grouped_matmul_kernel") in ran["integer"] - ran["decoder"]
    assert Place("device/activation.py", "sigmoids") in ran["activation"] - ran["integer"] - ran["decoder"]
    assert Place("device/dequant.py", "dequantize_kernel") in ran["decoder"]

    def asked(place: Place, **changes: Any) -> list[str]:
        mutant = next(m for m in everything() if m.place == place and m.by_hand == bool(changes))
        [outcome] = run([mutant], passing, _setting(**changes), coverage=healthy.coverage)
        assert not outcome.kills, outcome
        return outcome.judged

    passing = [replace(item, checks=_item(item.checks[0].name, passes).checks) for item in items]
    assert [item.id for item in passing] == [item.id for item in items]
    everyone = [check.name for check in checks]
    assert asked(Place("device/activation.py", "sigmoids")) == ["activation"]
    assert asked(Place("device/activation.py", "activation_kernel"), matrix=True) == everyone
    assert asked(Place("device/grouped_matmul.py", "GroupedMatmul.__init__")) == everyone, "not jit"
    assert asked(Place("device/hopper_fragments.py", "fragments_tile")) == everyone, "nobody runs it"


def test_a_mutant_that_leaves_torch_changed_is_killed() -> None:
    def change(candidate: object) -> list[Finding]:
        torch.set_default_dtype(torch.float64)
        return [_finding(True)]

    [outcome] = _ask([_item("toy", change)], [_swept()])
    assert [*outcome.kills] == ["state"]
    assert "state" in FOREIGN
    result = judge([], [_item("toy", passes)], _setting())
    assert result.checks == ["toy", "state"]


def test_bits_that_could_not_be_computed_are_not_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(items: object) -> Item:
        return _item("bits", lambda candidate: 1 / 0)  # type: ignore[arg-type, return-value]

    monkeypatch.setattr(session, "bits", broken)
    monkeypatch.setattr(session, "arguments", lambda *_: {_swept().name: "an argument"})
    with pytest.raises(FalseKillError, match=r"give no results: \{'bits': 'toy: ZeroDivisionError"):
        judge([_swept()], [_item("toy", passes)], _setting())


def _swept() -> Mutant:
    return next(mutant for mutant in everything() if not mutant.by_hand and not mutant.gpu_only)


def test_rejected_sources_stop_the_run() -> None:
    with pytest.raises(FalseKillError, match="check 'toy' rejects the unmutated sources"):
        judge([], [_item("toy", fails)], _setting())


def test_a_declared_equivalent_must_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = locate(Place("device/decode.py"), Edit("2.0**126", "float(2**126)"), SOURCES, "respelt")
    harmful = _named("bias twice")
    monkeypatch.setattr(session, "arguments", lambda *_: dict.fromkeys(("respelt", "bias twice"), "an argument"))
    case = smallest(torch.float32)
    blind = Check("blind", "Accepts everything.", Asked.OWN, lambda *_: [case], once, lambda *_: [_finding(True)])
    result = judge([harmless, harmful], plan(Scope("small", "cpu"), own=True, checks=[blind]), _setting())
    assert [judged.fate for judged in result.judged] == [Fate.EQUIVALENT, Fate.SURVIVED]
    assert result.exit_code == 1


_KERNEL = "grouped_matmul_kernel"
_OUTER = "outer_tile"


@pytest.mark.parametrize(
    ("file", "function", "edit", "check"),
    [
        ("schedule", "Routing.tiles", Edit("block_m not in self.tables", "not self.tables"), "tables"),
        ("schedule", "write_tiles", Edit("t = start + ...", "t = ..."), "tables"),
        ("grouped_matmul", _KERNEL, Edit("rows < end", "rows < P", "target, keep = ..."), "determinism"),
        ("dequant", "dequantize_kernel", Edit("tl.int64", "tl.int32", "expert = ..."), "index width, decoder"),
        ("dequant", "dequantize_experts", Edit("out.shape != shape or ... or ...", "False"), "refusals"),
        ("schedule", "source_rows", Edit("position < P", "position <= P"), "out of range"),
        ("schedule", "expert_rows", Edit("tl.int64", "tl.int32", "end = ..."), "out of range"),
        ("grouped_outer", _OUTER, Edit("tl.int64", "tl.int32", "expert = ..."), "index width"),
        ("slots", "combine_kernel", Edit("tl.float32", "tl.float16", "gate = ..."), "integer, further"),
    ],
)
def test_a_check_sees_what_it_was_made_for(file: str, function: str, edit: Edit, check: str) -> None:
    """One mutant for each check that came late: the cases before it let this one live."""
    mutant = locate(Place(f"device/{file}.py", function), edit, SOURCES, "late")
    [asked] = [each for each in CHECKS if each.name == check]
    healthy, mutated = _ask(plan(Scope("small", "cpu"), own=True, checks=[asked]), [None, mutant])
    assert healthy.kills == {}
    assert set(mutated.kills) == {check}


def test_the_sources_survive_and_a_sample_of_mutants_does_not() -> None:
    """A small sample by one question a check: `mxref mutants` asks all about more, `test_small_gate` about the sources.

    Of the activation, whose forms differ, every question; of sequences, which take longer than all else, none. Who
    survives is asked all.
    """
    mutants = stratified([mutant for mutant in everything() if mutant.by_hand and not mutant.gpu_only], 8, seed=0)
    asked, seen = list[Item](), {"sequences"}
    for item in questions(CPU):
        name = item.checks[0].name
        if name == "activation" or name not in seen:
            asked.append(item)
        seen.add(name)
    result = judge(mutants, asked, _setting())
    assert len(result.checks) > 20
    alive = [judged.mutant for judged in result.judged if judged.fate is Fate.SURVIVED]
    left = judge(alive, questions(CPU), _setting())
    assert [judged.mutant.name for judged in left.judged if judged.fate is not Fate.KILLED] == []
    assert result.counts()[Fate.KILLED] + result.counts()[Fate.EQUIVALENT] + len(alive) == 8
    assert result.counts()[Fate.KILLED] > 5


def test_the_matrix_survives_a_crash() -> None:
    toys = [_item("first", fails), _item("second", _crash)]
    toys += [_item("third", fails), _item("fourth", passes)]
    told: list[Outcome] = []
    [outcome] = run([_named("bias twice")], toys, _setting(matrix=True), on_outcome=told.append)
    assert set(outcome.kills) == {"first", "second", "third"}
    assert outcome.judged == ["first", "second", "third", "fourth"]
    assert told == [outcome]


def test_who_forks_for_a_gpu_never_touches_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that has initialised CUDA cannot hand it to its forks, so that every mutant would seem killed."""
    touched, cuda = tmp_path / "touched", torch.device("cuda")

    def initialise() -> None:
        with touched.open("a") as file:
            print(os.getpid(), file=file)
        raise RuntimeError("CUDA was initialised")

    monkeypatch.setattr(torch.cuda, "_lazy_init", initialise)
    with pytest.raises(FalseKillError, match="CUDA was initialised"):  # by the child that judges the sources
        judge([_named("tf32")], questions(cuda), _setting(device=cuda))
    assert str(os.getpid()) not in touched.read_text().split()


def test_a_gpu_is_judged_where_only_it_rounds() -> None:
    """TF32, and parameters wider than the activations: values off the narrower grid are needed to see either."""
    wide = {case.name: draw(case).problem for case in drawn_cases("cuda")}
    parameters = wide["fp32 parameters"]
    for x in (parameters.lora_A, parameters.lora_B, parameters.gates, parameters.expert_biases):
        assert x is not None
        assert x.dtype == torch.float32
        assert (x != x.to(torch.bfloat16)).any()
    assert wide["fp32"].dtype == torch.float32
    assert wide["fp32"].gates is not None


def test_nothing_is_said_of_compiled_code_when_the_sources_themselves_do_not_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mutant = next(m for m in everything() if m.place.function == "e2m1")
    done = subprocess.CompletedProcess([], 0, stdout="broken\n")
    monkeypatch.setattr(compiled.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(RuntimeError, match="the unmutated kernels do not compile"):
        compiled.same_code([mutant], SOURCES)


@pytest.mark.gpu
def test_mutants_that_only_a_gpu_shows_are_killed() -> None:
    """A sample, in a process of its own, which forks before it touches the GPU; `mxref mutants` runs them all."""
    command = [
        sys.executable,
        "-m",
        "mxref.verification.cli",
        "mutants",
        "--gpu-only",
        "--by-hand",
        "--sample",
        "6",
        "--jobs",
        "3",
    ]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr
