"""Mutants are judged: what kills one, what says nothing about it, what survives, and what is kept of it."""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mxref.verification.cases.small import fixtures
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.gate.run import GUARDS
from mxref.verification.studies.mutation import compiled, record, runner, session
from mxref.verification.studies.mutation.catalogue import catalogue, stratified
from mxref.verification.studies.mutation.layers import Layer, Trial, gate_layers, layers, questions
from mxref.verification.studies.mutation.locate import Edit, locate
from mxref.verification.studies.mutation.mutant import Mutant
from mxref.verification.studies.mutation.runner import Outcome, Setting, run
from mxref.verification.studies.mutation.session import EQUIVALENT_SHARE, FalseKillError, Fate, Judged, Session, judge
from mxref.verification.studies.mutation.sources import Place, Source, read_sources
from mxref.verification.studies.processes import Limits

SOURCES = read_sources()
CPU = torch.device("cpu")


@cache
def everything() -> list[Mutant]:
    return catalogue(SOURCES)


def _finding(ok: bool) -> Finding:
    return Finding("toy", "case", "Y", Status.PASS if ok else Status.FAIL, "a reason", 1, int(not ok))


def _layer(name: str, judge_by: object) -> Layer:
    return Layer(name, (Trial("trial", judge_by),))  # type: ignore[arg-type]


def _named(name: str) -> Mutant:
    return next(mutant for mutant in everything() if mutant.name == name)


def _setting(**changes: Any) -> Setting:
    return replace(Setting(SOURCES, CPU), **changes)


def _ask(toys: Sequence[Layer], mutants: Sequence[Mutant | None] = (None,), **changes: Any) -> list[Outcome]:
    return run(mutants, questions(toys), _setting(**changes))


def _crash(candidate: object) -> list[Finding]:
    ctypes.string_at(0)
    return []


def _spin(candidate: object) -> list[Finding]:
    """Use processor time in a loop that no signal ends, as a library that waits for a GPU, or an allocator."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while True:
        pass


def _sleep(candidate: object) -> list[Finding]:
    time.sleep(3600)
    return []


def test_a_crash_and_a_loop_are_kills() -> None:
    toys = [_layer("crash", _crash), _layer("spin", _spin), _layer("next", lambda _: [_finding(True)])]
    [outcome] = _ask(toys, matrix=True, trial_seconds=0.5)
    assert outcome.kills["crash"] == "crashed: SIGSEGV"
    assert "of processor time" in outcome.kills["spin"]
    assert (set(outcome.kills), outcome.unjudged, outcome.judged[-1]) == ({"crash", "spin"}, {}, "next")


@pytest.mark.parametrize(("control", "hangs"), [(1.9, True), (2.1, False), (math.inf, False)])
def test_waiting_is_a_kill_only_where_the_sources_hardly_wait(
    control: float, hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its limit is 20 s of silence; 0.2 s here, after which the child is ended twice."""
    asked = []
    monkeypatch.setattr(Setting, "limits", lambda *_: Limits(silence=0.2))
    monkeypatch.setattr(runner._Judge, "control", lambda _, part: asked.append(part.check) or control / 100)
    [outcome] = _ask([_layer("first", _sleep), _layer("next", lambda _: [_finding(True)])])
    assert asked == ["first"]
    told = outcome.kills if hangs else outcome.unjudged
    assert "by the clock" in told["first"]
    assert bool(outcome.kills) == hangs
    assert ("next" in outcome.judged) != hangs, "what is left is asked where nothing has killed it"


def test_the_control_is_the_unmutated_sources_alone(tmp_path: Path) -> None:
    judge_by = runner._Judge(_setting(), tmp_path, lambda _: None)
    ways = [lambda _: [_finding(True)], lambda _: [_finding(False)], _crash, _sleep]
    asked = questions([_layer(str(i), way) for i, way in enumerate(ways)])
    part = runner._Part(Outcome(_named("sign bit lost")), asked, Limits(silence=1.0), tmp_path)
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

    [outcome] = _ask([_layer("toy", ended_at_first)])
    assert (set(outcome.kills), outcome.unjudged) == ({"toy"}, {})
    assert "a reason" in outcome.kills["toy"]


@pytest.mark.parametrize(
    ("line", "kills", "unjudged"),
    [
        ("raise NameError('gone')", {"import": "NameError: gone"}, {}),
        ("raise SyntaxError('no code')", {"import": "SyntaxError: no code"}, {}),
        ("raise MemoryError", {}, {"import": "crashed: exit status 1"}),
        ("import os; os.abort()", {}, {"import": "crashed: SIGABRT"}),
        ("import os; os.kill(os.getpid(), 9)", {}, {"import": "crashed: SIGKILL"}),
        ("while True: pass", {}, {"import": "hung: no result in 1 s of processor time"}),
    ],
)
def test_only_an_exception_kills_while_importing(
    line: str, kills: dict[str, str], unjudged: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = Edit("NAN_BITS = ...", f"NAN_BITS = ...\n{line}")
    mutant = locate(Place("device/decode.py"), edit, SOURCES, "does not import")
    monkeypatch.setattr(runner, "_IMPORTING", Limits(processor=1.0))
    judged = judge([mutant], [_layer("toy", lambda _: [_finding(True)])], fixtures(CPU)[:1], _setting())
    [told] = judged.judged
    assert told.kills == kills
    assert (told.fate, told.reason) == (Fate.KILLED if kills else Fate.UNJUDGED, *(kills or unjudged).values())
    assert judged.exit_code == int(not kills)


def test_the_unmutated_sources_are_judged_in_as_many_processes_as_there_are() -> None:
    """And what there was no time for is told apart from what was judged."""
    toys = [_layer(name, lambda _: [_finding(True)]) for name in ("first", "second")]
    mutant = _named("bias twice")
    together = run([None, mutant], questions(toys), _setting(jobs=2), apart=True)
    assert [(outcome.mutant, outcome.judged) for outcome in together] == [
        (None, ["first"]), (None, ["second"]), (mutant, ["first", "second"]),
    ]  # fmt: skip
    session = judge([mutant], toys, fixtures(CPU)[:1], _setting(), seconds=0)
    assert [judged.fate for judged in session.judged] == [Fate.UNJUDGED]
    assert session.exit_code == 1


def test_the_matrix_asks_every_layer() -> None:
    toys = [_layer("first", lambda _: [_finding(False)]), _layer("second", lambda _: [_finding(True)])]
    toys.append(_layer("third", lambda _: [_finding(False)]))
    [first], [every] = _ask(toys), _ask(toys, matrix=True)
    assert (set(first.kills), first.judged) == ({"first"}, ["first"])
    assert (set(every.kills), set(every.judged)) == ({"first", "third"}, {"first", "second", "third"})


def test_rejected_sources_stop_the_run() -> None:
    with pytest.raises(FalseKillError, match="layer 'toy' rejects the unmutated sources"):
        judge([], [_layer("toy", lambda _: [_finding(False)])], [], _setting())


def test_a_declared_equivalent_must_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = locate(Place("device/decode.py"), Edit("2.0**126", "float(2**126)"), SOURCES, "respelt")
    harmful = _named("bias twice")
    monkeypatch.setattr(session, "arguments", lambda *_: dict.fromkeys(("respelt", "bias twice"), "an argument"))
    blind = [_layer("blind", lambda _: [_finding(True)])]
    result = judge([harmless, harmful], blind, fixtures(CPU)[:1], _setting())
    assert [judged.fate for judged in result.judged] == [Fate.EQUIVALENT, Fate.SURVIVED]
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("place", "edit", "layer"),
    [
        (
            Place("device/schedule.py", "Routing.tiles"),
            Edit("block_m not in self._tiles", "not self._tiles"),
            "schedule",
        ),
        (Place("device/schedule.py", "tiles_kernel"), Edit("t = start + ...", "t = ..."), "schedule"),
        (
            Place("device/grouped_matmul.py", "grouped_matmul_kernel"),
            Edit("rows < end", "rows < P", "target, keep = ..."),
            "determinism",
        ),
        (Place("device/dequant.py", "dequantize_kernel"), Edit("tl.int64", "tl.int32", "expert = ..."), "indices"),
        (
            Place("device/dequant.py", "dequantize_experts"),
            Edit("out.shape != shape or ... or ...", "out.shape != shape"),
            "operators",
        ),
        (Place("device/schedule.py", "source_rows"), Edit("position < P", "position <= P"), "memory"),
        (Place("device/schedule.py", "expert_rows"), Edit("tl.int64", "tl.int32", "end = ..."), "margins"),
        (
            Place("device/grouped_outer.py", "grouped_outer_kernel"),
            Edit("tl.int64", "tl.int32", "expert = ..."),
            "indices",
        ),
        (Place("device/slots.py", "combine_kernel"), Edit("tl.float32", "tl.float16", "gate = ..."), "integer"),
    ],
)
def test_a_guard_sees_what_it_was_made_for(place: Place, edit: Edit, layer: str) -> None:
    """One mutant for each guard that came late: the cases before it let this one live."""
    mutant = locate(place, edit, SOURCES, "late")
    healthy, mutated = _ask([each for each in layers(CPU) if each.name == layer], [None, mutant])
    assert healthy.kills == {}
    assert set(mutated.kills) == {layer}


def test_the_gate_itself_judges_mutants() -> None:
    assert {layer.name for layer in gate_layers(CPU)} <= set(GUARDS)
    asked = [layer for layer in gate_layers(CPU) if layer.name in ("operators", "margins")]
    healthy, mutated = _ask(asked, [None, _named("operator drops the bias")])
    assert healthy.kills == {}
    assert set(mutated.kills) == {"operators"}


def test_the_sources_survive_and_a_sample_of_mutants_does_not() -> None:
    """A small sample by the layers that are not slow: `mxref mutants` runs larger ones, and all of it on request."""
    mutants = stratified([mutant for mutant in everything() if mutant.by_hand and not mutant.gpu_only], 8, seed=0)
    quick = [layer for layer in layers(CPU) if not layer.slow]
    result = judge(mutants, quick, fixtures(CPU), _setting())
    assert [judged.mutant.name for judged in result.judged if judged.fate is Fate.SURVIVED] == []
    assert result.counts()[Fate.KILLED] + result.counts()[Fate.EQUIVALENT] == 8
    assert result.exit_code == 0  # at most one of them equivalent


def test_the_matrix_survives_a_crash() -> None:
    toys = [_layer("first", lambda _: [_finding(False)]), _layer("second", _crash)]
    toys += [_layer("third", lambda _: [_finding(False)]), _layer("fourth", lambda _: [_finding(True)])]
    told: list[Outcome] = []
    [outcome] = run([None], questions(toys), _setting(matrix=True), on_outcome=told.append)
    assert set(outcome.kills) == {"first", "second", "third"}
    assert outcome.judged == ["first", "second", "third", "fourth"]
    assert told == [outcome]


def test_a_record_tells_what_happened_and_when_it_is_stale(tmp_path: Path) -> None:
    mutants = [_named("bias twice"), _named("nibbles swapped")]
    verdicts = {"bias twice": {"integer": "a reason"}, "nibbles swapped": {}}
    recorded = Session("cpu", "digest", True, ["integer", "decode"])
    recorded.judged += [
        Judged(mutant, Fate.KILLED if verdicts[mutant.name] else Fate.SURVIVED, verdicts[mutant.name], 1.0)
        for mutant in mutants
    ]
    path = tmp_path / "record" / "mutants.json"
    record.write(recorded, SOURCES, path)
    entry, text = json.loads(path.read_text()), path.with_suffix(".md").read_text()
    assert entry["killed"] == {"bias twice": ["integer"]}
    assert entry["survived"] == ["nibbles swapped"]
    assert "1 of 2 mutants killed" in text
    assert "tl.join(nibbles >> 4, nibbles & 0xF)" in text
    assert record.stale(entry, mutants, SOURCES) == ""
    assert record.unexplained(entry, mutants, SOURCES) == mutants[1:]
    assert [judged.mutant for judged in record.judged_before(entry, mutants)] == mutants[:1]
    with pytest.raises(ValueError, match="another catalogue"):
        record.unexplained(entry, [*mutants, _named("sign bit lost")], SOURCES)
    commented = SOURCES | {
        "device/decode.py": Source("device/decode.py", SOURCES["device/decode.py"].text + "# a comment\n")
    }
    assert record.stale(entry, mutants, commented) == ""
    changed = SOURCES | {"device/decode.py": Source("device/decode.py", SOURCES["device/decode.py"].text + "x = 1\n")}
    assert "older than kernels/device/decode.py; refresh it: mxref mutants --all" in record.stale(
        entry, mutants, changed
    )


def test_the_record_of_the_whole_catalogue() -> None:
    """Nothing survived. A kernel that changed since is an expected failure; the sample above judges it as it is."""
    if not record.RECORD.is_file():
        pytest.xfail(f"nothing is recorded yet; run {record.COMMANDS['cpu']}")
    entry = json.loads(record.RECORD.read_text())
    assert entry["survived"] == []
    assert len(entry["equivalent"]) <= EQUIVALENT_SHARE * (len(entry["equivalent"]) + len(entry["killed"]))
    mutants = [mutant for mutant in everything() if not mutant.gpu_only]
    told = record.stale(entry, mutants, SOURCES)
    if told:
        pytest.xfail(told)
    assert {*entry["killed"], *entry["equivalent"]} == {mutant.name for mutant in mutants}


@pytest.mark.parametrize(
    "path", sorted(record.EVIDENCE.glob("nvidia-*/mutants.json")), ids=lambda path: path.parent.name
)
def test_the_record_of_what_only_a_gpu_shows(path: Path) -> None:
    """What it leaves open is an expected failure, with the command that goes on."""
    entry = json.loads(path.read_text())
    mutants = [mutant for mutant in everything() if mutant.gpu_only]
    told = record.stale(entry, mutants, SOURCES)
    if told:
        pytest.xfail(told)
    left = record.unexplained(entry, mutants, SOURCES)
    if left:
        pytest.xfail(f"{len(left)} of {len(mutants)} are open; go on: {entry['command'].replace('--all', '--rest')}")
    assert len(entry["equivalent"]) <= EQUIVALENT_SHARE * len(mutants)


def test_who_forks_for_a_gpu_never_touches_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that has initialised CUDA cannot hand it to its forks, so that every mutant would seem killed."""
    touched, cuda = tmp_path / "touched", torch.device("cuda")

    def initialise() -> None:
        with touched.open("a") as file:
            print(os.getpid(), file=file)
        raise RuntimeError("CUDA was initialised")

    monkeypatch.setattr(torch.cuda, "_lazy_init", initialise)
    with pytest.raises(FalseKillError, match="CUDA was initialised"):  # by the child that judges the sources
        judge([_named("tf32")], layers(cuda), fixtures(cuda), _setting(device=cuda))
    assert str(os.getpid()) not in touched.read_text().split()


def test_a_gpu_is_judged_where_only_it_rounds() -> None:
    """TF32, and parameters wider than the activations: values off the narrower grid are needed to see either."""
    wide = {sample.case.name: sample.problem for sample in fixtures(torch.device("cuda"))}
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
