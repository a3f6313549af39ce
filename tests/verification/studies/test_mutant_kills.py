"""Mutants of the shipped sources: what checks see of them, on a CPU, compiled and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mutant_toys import CPU, SOURCES, ask_toys, everything, named, setting

from mxref.verification.cases.draw import draw
from mxref.verification.cases.own.small import drawn_cases
from mxref.verification.cases.scope import Scope
from mxref.verification.checks.registry import CHECKS
from mxref.verification.gate.plan import Item, plan
from mxref.verification.studies.mutation import compiled
from mxref.verification.studies.mutation.catalogue import stratified
from mxref.verification.studies.mutation.locate import Edit, locate
from mxref.verification.studies.mutation.questions import questions
from mxref.verification.studies.mutation.session import FalseKillError, Fate, judge
from mxref.verification.studies.mutation.sources import Place

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
    healthy, mutated = ask_toys(plan(Scope("small", "cpu"), own=True, checks=[asked]), [None, mutant])
    assert healthy.kills == {}
    assert set(mutated.kills) == {check}


def test_the_sources_survive_and_a_sample_of_mutants_does_not() -> None:
    """A small sample by one question a check: `mxref mutants` asks all about more, `test_small_gate` about the sources.

    Of the activation, whose forms differ, every question; of sequences, which take longer than all else, none. Who
    survives is asked all.
    """
    mutants = stratified([mutant for mutant in everything() if mutant.by_hand and not mutant.gpu_only], 5, seed=0)
    asked, seen = list[Item](), {"sequences"}
    for item in questions(CPU):
        name = item.checks[0].name
        if name == "activation" or name not in seen:
            asked.append(item)
        seen.add(name)
    result = judge(mutants, asked, setting())
    assert len(result.checks) > 20
    alive = [judged.mutant for judged in result.judged if judged.fate is Fate.SURVIVED]
    left = judge(alive, questions(CPU), setting()).judged if alive else []
    assert [judged.mutant.name for judged in left if judged.fate is not Fate.KILLED] == []
    assert result.counts()[Fate.KILLED] + result.counts()[Fate.EQUIVALENT] + len(alive) == 5
    assert result.counts()[Fate.KILLED] > 2


def test_who_forks_for_a_gpu_never_touches_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that has initialised CUDA cannot hand it to its forks, so that every mutant would seem killed."""
    touched, cuda = tmp_path / "touched", torch.device("cuda")

    def initialise() -> None:
        with touched.open("a") as file:
            print(os.getpid(), file=file)
        raise RuntimeError("CUDA was initialised")

    monkeypatch.setattr(torch.cuda, "_lazy_init", initialise)
    with pytest.raises(FalseKillError, match="CUDA was initialised"):  # by the child that judges the sources
        judge([named("tf32")], questions(cuda), setting(device=cuda))
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
@pytest.mark.minutes
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
