"""The catalogue of planted bugs: it fits the sources, covers them, and what it plants is noticed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from mxref.verification.cases.small import fixtures
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.gate.run import GUARDS
from mxref.verification.studies.mutation import compiled, equivalents, record
from mxref.verification.studies.mutation.equivalence import Equivalent
from mxref.verification.studies.mutation.layers import Layer, Trial, gate_layers, layers
from mxref.verification.studies.mutation.mutant import Bug, Mutant, Source, StaleMutantError, locate
from mxref.verification.studies.mutation.mutants import BUGS, catalogue, read_sources, stratified
from mxref.verification.studies.mutation.runner import run
from mxref.verification.studies.mutation.session import EQUIVALENT_SHARE, FalseKillError, Fate, Judged, Session, judge
from mxref.verification.studies.mutation.sweep import OPERATORS, sweep

SOURCES = read_sources()

CPU = torch.device("cpu")

CATEGORIES = {
    "decode", "scales", "scheduling", "masks", "tails", "LoRA scaling", "expert indexing", "accumulation", "rounding",
    "dA/dB", "gates", "biases", "sentinels",
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_by_hand_fits_the_sources(bug: Bug) -> None:
    mutant = locate(bug, SOURCES)
    text = SOURCES[bug.file].text
    assert mutant.apply(text) != text
    assert bug.why


def test_names_are_unique() -> None:
    names = [mutant.name for mutant in everything()]
    assert len(set(names)) == len(names)


def test_no_two_mutants_are_the_same_edit() -> None:
    edited = [(mutant.file, mutant.apply(SOURCES[mutant.file].text)) for mutant in everything() if not mutant.by_hand]
    assert len(set(edited)) == len(edited)


def test_every_mutant_parses() -> None:
    for mutant in everything():
        ast.parse(mutant.apply(SOURCES[mutant.file].text))


def test_the_catalogue_is_large_enough() -> None:
    assert len(BUGS) >= 120
    assert len({(mutant.file, mutant.line) for mutant in everything() if mutant.by_hand}) >= 60


def test_bugs_by_hand_cover_every_kind_of_mistake() -> None:
    assert {bug.category for bug in BUGS} >= CATEGORIES


def test_every_jit_function_and_launcher_has_mutants() -> None:
    swept = {(mutant.file, mutant.function) for mutant in everything() if not mutant.by_hand}
    there = {(s.file, f.name) for s in SOURCES.values() for f in s.functions if f.jit or f.launches}
    only_assembly = {(s.file, name) for s in SOURCES.values() for name in s.gpu_only}
    assert there - swept <= only_assembly
    by_hand = {(mutant.file, mutant.function) for mutant in everything() if mutant.by_hand}
    assert there <= swept | by_hand


def test_every_declared_equivalent_is_in_the_catalogue() -> None:
    assert equivalents.stale(everything(), SOURCES) == []


def test_a_stale_mutant_is_named() -> None:
    bug = Bug("gone", "device/decode.py", "no such text", "", "decode", "")
    with pytest.raises(
        StaleMutantError, match=r"'gone' is stale: its snippet occurs 0 times in kernels/device/decode.py"
    ):
        locate(bug, SOURCES)
    with pytest.raises(StaleMutantError, match=r"there is no kernels/other\.py"):
        locate(replace(bug, file="other.py"), SOURCES)
    with pytest.raises(StaleMutantError, match="changes no code"):
        locate(replace(bug, before="2.0**126", after="2.0 ** 126"), SOURCES)
    with pytest.raises(StaleMutantError, match="does not parse"):
        locate(replace(bug, before="2.0**126", after="2.0 **"), SOURCES)


def test_each_operator_plants_something() -> None:
    assert {mutant.category for mutant in everything() if not mutant.by_hand} == set(OPERATORS)


@cache
def everything() -> list[Mutant]:
    return catalogue(SOURCES)


TOY = Source(
    "toy.py",
    '''
@triton.jit
def kernel(x, n, stride_a, stride_b, FAST: tl.constexpr):
    """Doc − string."""
    i = tl.arange(0, 8)
    if FAST:
        fast(x)
    acc = tl.load(x + i * stride_a, mask=i < n, other=0).to(tl.int64)
    tl.store(x + i * stride_b, acc, mask=(i < n) & (i > 0))


@triton.jit
def fast(x):
    return x + 1


def helper(n):
    return n + 1
''',
)


def test_the_sweep_finds_what_a_person_would() -> None:
    edits = {mutant.edit(TOY.text)[1]: mutant for mutant in sweep(TOY)}
    expected = [
        "i = tl.arange(0, (8 + 1))",
        "acc = tl.load(x + i * stride_b, mask=i < n, other=0).to(tl.int64)",
        "acc = tl.load(x + i * stride_a, mask=((i) <= (n)), other=0).to(tl.int64)",
        "acc = tl.load(x + i * stride_a).to(tl.int64)",
        "acc = tl.load(x + i * stride_a, mask=i < n, other=0).to(tl.int32)",
        "acc = tl.load((x), mask=i < n, other=0).to(tl.int64)",
        "tl.store(x + i * stride_b, acc, mask=((i < n) | (i > 0)))",
        "tl.store(x + i * stride_b, acc)",
        "pass",
    ]
    missing = [text for text in expected if text not in edits]
    assert not missing, sorted(edits)
    assert not any(mutant.function == "helper" for mutant in edits.values())


def test_what_only_a_gpu_runs_is_known() -> None:
    assert TOY.gpu_only == {"fast"}
    for mutant in sweep(TOY):
        left_out = (mutant.before, mutant.after) == ("FAST", "False")
        assert mutant.gpu_only == (mutant.function == "fast" or "fast(" in mutant.before or left_out), mutant


def test_what_only_the_tilings_of_a_gpu_notice_is_known() -> None:
    text = """
def launcher(n, config):
    if n % 16 or n < 3:
        config = config.dense()
    launch(kernel, n + 1, config)
"""
    sides = {mutant.before: mutant.gpu_only for mutant in sweep(Source("toy.py", text))}
    for_a_gpu = {"n % 16", "n < 3", "n % 16 or n < 3", "16", "3"}
    assert for_a_gpu < sides.keys()
    assert all(gpu_only == (before in for_a_gpu) for before, gpu_only in sides.items()), sides


def test_a_stratified_sample_takes_the_functions_in_turn() -> None:
    functions = {(mutant.file, mutant.function) for mutant in everything()}
    chosen = stratified(everything(), len(functions), seed=1)
    assert {(mutant.file, mutant.function) for mutant in chosen} == functions
    assert chosen == stratified(everything(), len(functions), seed=1)
    assert chosen != stratified(everything(), len(functions), seed=2)
    assert len(stratified(everything(), 10**6, seed=0)) == len(everything())


def _finding(ok: bool) -> Finding:
    return Finding("toy", "case", "Y", Status.PASS if ok else Status.FAIL, "a reason", 1, int(not ok))


def _layer(name: str, judge_by: object) -> Layer:
    return Layer(name, (Trial("trial", judge_by),))  # type: ignore[arg-type]


def _named(name: str) -> Mutant:
    return next(mutant for mutant in everything() if mutant.name == name)


def test_a_crash_and_a_loop_are_kills() -> None:
    def crash(candidate: object) -> list[Finding]:
        import ctypes

        ctypes.string_at(0)
        return []

    def loop(candidate: object) -> list[Finding]:
        while True:
            pass

    crashed, hung = (
        run([None], SOURCES, [_layer("toy", way)], device=CPU, trial_seconds=0.5)[0] for way in (crash, loop)
    )
    assert crashed.kills == {"toy": "crashed: SIGSEGV"}
    assert "hung" in hung.kills["toy"]


def test_a_child_that_waits_outside_python_is_ended_soon() -> None:
    """A GPU that never answers: Python's handler would only run when the wait is over."""

    def wait(candidate: object) -> list[Finding]:
        import signal

        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])
        while True:
            pass

    outcome = run([None], SOURCES, [_layer("toy", wait)], device=CPU, trial_seconds=0.5)[0]
    assert outcome.kills == {"toy": "crashed: SIGVTALRM"}


def test_the_unmutated_sources_are_judged_in_as_many_processes_as_there_are() -> None:
    """And what there was no time for is told apart from what was judged."""
    toys = [_layer(name, lambda _: [_finding(True)]) for name in ("first", "second")]
    mutant = _named("bias twice")
    together = run([None, mutant], SOURCES, toys, device=CPU, apart=True, jobs=2)
    assert [(outcome.mutant, outcome.judged) for outcome in together] == [
        (None, ["first"]), (None, ["second"]), (mutant, ["first", "second"]),
    ]  # fmt: skip
    session = judge([mutant], SOURCES, toys, fixtures(CPU)[:1], CPU, seconds=0)
    assert (session.judged, session.unjudged, session.exit_code) == ([], [mutant], 1)


def test_a_child_that_no_signal_reaches_is_a_kill() -> None:
    def spin(candidate: object) -> list[Finding]:
        import signal

        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF, signal.SIGVTALRM])
        while True:
            pass

    toys = [_layer("toy", spin), _layer("next", lambda _: [_finding(True)])]
    outcome = run([None], SOURCES, toys, device=CPU, trial_seconds=0.5, matrix=True)[0]
    assert outcome.kills == {"toy": "crashed: SIGKILL"}
    assert outcome.judged[-1] == "next"


def test_the_matrix_asks_every_layer() -> None:
    toys = [_layer("first", lambda _: [_finding(False)]), _layer("second", lambda _: [_finding(True)])]
    toys.append(_layer("third", lambda _: [_finding(False)]))
    first = run([None], SOURCES, toys, device=CPU)[0]
    every = run([None], SOURCES, toys, device=CPU, matrix=True)[0]
    assert (set(first.kills), first.judged) == ({"first"}, ["first"])
    assert (set(every.kills), set(every.judged)) == ({"first", "third"}, {"first", "second", "third"})


def test_rejected_sources_stop_the_run() -> None:
    with pytest.raises(FalseKillError, match="layer 'toy' rejects the unmutated sources"):
        judge([], SOURCES, [_layer("toy", lambda _: [_finding(False)])], [], CPU)


def test_a_declared_equivalent_must_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    respelt = Bug(
        "respelt", "device/decode.py", "tl.constexpr(2.0**126)", "tl.constexpr(float(2**126))", "decode", "the same"
    )
    harmless, harmful = locate(respelt, SOURCES), _named("bias twice")
    blind = [_layer("blind", lambda _: [_finding(True)])]
    entries = tuple(Equivalent(m.function, *m.edit(SOURCES[m.file].text), "an argument") for m in (harmless, harmful))
    monkeypatch.setattr(equivalents, "EQUIVALENTS", entries)
    result = judge([harmless, harmful], SOURCES, blind, fixtures(CPU)[:1], CPU)
    assert [judged.fate for judged in result.judged] == [Fate.EQUIVALENT, Fate.SURVIVED]
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("function", "after", "layer"),
    [
        ("Routing.tiles", "if not self._tiles:", "schedule"),
        ("tiles_kernel", "t = (tl.arange(0, CHUNK))", "schedule"),
        (
            "grouped_matmul_kernel",
            "target, keep = source_rows(rows, rows < P, positions, fan_out, P)",
            "determinism",
        ),
        ("dequantize_kernel", "expert = tl.load(experts + place).to(tl.int32)", "indices"),
        ("dequantize_experts", "elif (out.shape != shape):", "operators"),
        ("source_rows", "return position // fan, (position >= 0) & (((position) <= (P)))", "memory"),
        ("expert_rows", "end = tl.load(offsets + expert).to(tl.int32)", "margins"),
        ("grouped_outer_kernel", "expert = (tl.program_id(0) // blocks).to(tl.int32)", "indices"),
        ("combine_kernel", "gate = tl.load(gates + t * slots + slot, mask=live, other=0).to(tl.float16)", "integer"),
    ],
)
def test_a_guard_sees_what_it_was_made_for(function: str, after: str, layer: str) -> None:
    """One mutant for each guard that came late: the cases before it let this one live."""
    [mutant] = [m for m in everything() if m.function == function and m.edit(SOURCES[m.file].text)[1] == after]
    [asked] = [each for each in layers(CPU) if each.name == layer]
    healthy, mutated = run([None, mutant], SOURCES, [asked], device=CPU)
    assert healthy.kills == {}
    assert set(mutated.kills) == {layer}


def test_the_gate_itself_judges_mutants() -> None:
    assert {layer.name for layer in gate_layers(CPU)} <= set(GUARDS)
    asked = [layer for layer in gate_layers(CPU) if layer.name in ("operators", "margins")]
    healthy, mutated = run([None, _named("operator drops the bias")], SOURCES, asked, device=CPU)
    assert healthy.kills == {}
    assert set(mutated.kills) == {"operators"}


def test_the_sources_survive_and_a_sample_of_mutants_does_not() -> None:
    """A small sample by the layers that are not slow: `mxref mutants` runs larger ones, and all of it on request."""
    mutants = stratified([mutant for mutant in everything() if mutant.by_hand and not mutant.gpu_only], 8, seed=0)
    quick = [layer for layer in layers(CPU) if not layer.slow]
    result = judge(mutants, SOURCES, quick, fixtures(CPU), CPU)
    assert [judged.mutant.name for judged in result.judged if judged.fate is Fate.SURVIVED] == []
    assert result.counts()[Fate.KILLED] + result.counts()[Fate.EQUIVALENT] == 8
    assert result.exit_code == 0  # at most one of them equivalent


def test_the_matrix_survives_a_crash() -> None:
    def crash(candidate: object) -> list[Finding]:
        import ctypes

        ctypes.string_at(0)
        return []

    toys = [_layer("first", lambda _: [_finding(False)]), _layer("second", crash)]
    toys += [_layer("third", lambda _: [_finding(False)]), _layer("fourth", lambda _: [_finding(True)])]
    told = []
    outcome = run([None], SOURCES, toys, device=CPU, matrix=True, on_outcome=told.append)[0]
    assert set(outcome.kills) == {"first", "second", "third"}
    assert outcome.kills["second"] == "crashed: SIGSEGV"
    assert told == [outcome]


def test_a_record_tells_what_happened_and_when_it_is_stale(tmp_path: Path) -> None:
    mutants = [_named("bias twice"), _named("nibbles swapped")]
    verdicts = {"bias twice": {"integer": "a reason"}, "nibbles swapped": {}}
    session = Session("cpu", "digest", True, ["integer", "decode"])
    session.judged += [
        Judged(mutant, Fate.KILLED if verdicts[mutant.name] else Fate.SURVIVED, verdicts[mutant.name], 1.0)
        for mutant in mutants
    ]
    path = tmp_path / "record" / "mutants.json"
    record.write(session, SOURCES, path)
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
        judge([_named("tf32")], SOURCES, layers(cuda), fixtures(cuda), cuda)
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
    mutant = next(m for m in everything() if m.function == "e2m1")
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
