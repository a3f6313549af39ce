"""Tuning: every candidate fits, the committed tiling is among them, and the fastest comes first."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace

import pytest
import torch
from benchmarks import WallClock
from rich.console import Console

from mxref.kernels import Config
from mxref.kernels.device.configs import config_for
from mxref.verification.bench import tuning
from mxref.verification.bench.workloads import Shape
from mxref.verification.cli import main
from mxref.verification.cli.own import tune
from mxref.verification.cli.own.tune import pinned_table, table

SHAPE = Shape("small", 2, 64, 64, 8, 2, rank=4)
CPU = torch.device("cpu")


def clock(*seconds: float) -> WallClock:
    """A clock on which the calls take these seconds, one after another."""
    times = itertools.chain.from_iterable((0.0, second) for second in seconds)
    return WallClock(lambda: next(times))


@pytest.mark.skipif(torch.cuda.is_available(), reason="times the interpreter")
def test_the_fastest_comes_first_and_the_committed_one_is_there() -> None:
    slow, fast = Config(16, 32, 32, num_stages=1), Config(32, 64, 64, num_stages=1)
    timings = tuning.tune_shape(SHAPE, CPU, clock(2.0, 3.0, 1.0), [slow, fast], samples=1)
    assert [timing.seconds for timing in timings] == [1.0, 2.0, 3.0]
    committed = config_for("interpreter", SHAPE.rows, SHAPE.experts, torch.float32)
    assert [timing.config for timing in timings] == [fast, committed, slow]
    assert [timing.committed for timing in timings] == [False, True, False]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(timings))
    assert "0.50" in console.export_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="times the interpreter")
def test_a_tiling_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Config(16, 32, 32, num_stages=1)
    right = tuning.parallel_linear_lora
    monkeypatch.setattr(
        tuning,
        "parallel_linear_lora",
        lambda config, **operands: right(config=config, **operands) * (1.5 if config == wrong else 1.0),
    )
    with pytest.raises(ArithmeticError, match="disagrees with the table's"):
        tuning.tune_shape(SHAPE, CPU, clock(*[1.0] * 9), [wrong], samples=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the interpreter")
def test_every_tiling_is_run_ahead_in_processes_of_their_own() -> None:
    fits, does_not = Config(16, 32, 32, num_stages=1), Config(16, 128, 128, num_warps=8, hopper=True)
    tuning.compile_ahead([SHAPE], CPU, [fits, fits], jobs=2)
    with pytest.raises(ValueError, match="is for bf16 on sm_90"):
        tuning.compile_ahead([SHAPE], CPU, [fits, does_not], jobs=2)


def test_pinning_costs_what_the_slowest_shape_loses() -> None:
    low, high, rare = (Config(m, 32, 32, num_stages=1) for m in (16, 32, 64))

    def timings(committed: Config, **seconds: float) -> list[tuning.Timing]:
        of = {"low": low, "high": high, "rare": rare}
        return [tuning.Timing("", "", of[name], s, of[name] == committed) for name, s in seconds.items()]

    tuned = [timings(low, low=1.0, high=4.0, rare=1.0), timings(high, low=3.0, high=1.0)]
    costs = tuning.pinned_costs(tuned)
    assert [(cost.config, cost.worst) for cost in costs] == [(low, 3.0), (high, 4.0)]
    assert costs[1].mean == pytest.approx(2.0)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(pinned_table(costs))
    assert "4.00" in console.export_text()


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_every_candidate_fits(architecture: str) -> None:
    found = tuning.candidates(architecture, torch.bfloat16)
    for config in found:
        config.check_fits(architecture, torch.bfloat16)
    assert any(config.hopper for config in found) == (architecture == "sm_90")
    assert len(set(found)) == len(found) > 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the interpreter")
def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = (SHAPE, replace(SHAPE, name="other"))
    monkeypatch.setattr(tune, "choose_device", lambda wanted, require_gpu: CPU)
    monkeypatch.setattr(tune, "CASES", shapes)
    monkeypatch.setattr(tune, "EventClock", lambda device: WallClock())
    monkeypatch.setattr(tune, "candidates", lambda arch, dtype: [Config(16, 32, 32, num_stages=1)])
    compiled: list[object] = []
    monkeypatch.setattr(tune, "compile_ahead", lambda *arguments: compiled.append(arguments))
    assert main(["tune"]) == 0
    out = capsys.readouterr().out
    assert len(compiled) == 1
    assert all(f"{shape.name} (" in out for shape in shapes)
    assert "one tiling for all of these shapes" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_tune_without_a_gpu_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 2
    assert "torch sees no CUDA GPU" in capsys.readouterr().err
