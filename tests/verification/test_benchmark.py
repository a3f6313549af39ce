"""The benchmark's plumbing on a CPU, with the golden model in the kernels' place and a clock that is told the time."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path as File
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import mxref
from mxref.verification import benchmark, benchmark_report, evidence, racing, timing, workloads
from mxref.verification.benchmark import Bench, gate_paths, run_benchmark
from mxref.verification.cli import main
from mxref.verification.options import EVIDENCE
from mxref.verification.paths import COMPOSITE, Path, our_paths
from mxref.verification.racing import Effort, Row, time_shape
from mxref.verification.timing import Captured, Ceilings, WallClock, measure_ceilings
from mxref.verification.workloads import MEASURES, Shape, Workload

CPU = torch.device("cpu")
TINY = Shape("tiny", 4, 64, 32, 6, 2, rank=4)
STEP, FORWARD, BASE, BASE_FORWARD = MEASURES
EFFORT = Effort(rounds=2, samples=4, seconds=1e9)
GOLDEN = Path("golden", "the golden model", mxref.parallel_linear_lora)


class FakeClock:
    """Captures everything; a call takes what `costs` says of the path that it runs, in turn."""

    def __init__(self, captures: bool = True) -> None:
        self.captures = captures
        self.calls: list[Any] = []

    def sample(self, call: Callable[[], object], count: int) -> list[float]:
        self.calls.append(call)
        call()
        return [1.0 + 0.01 * i for i in range(count)]

    def capture(self, run: timing.Run) -> Captured | None:
        return Captured(lambda: None, run()) if self.captures else None

    def extra_bytes(self, run: timing.Run) -> int | None:
        run()
        return 1000


def fixed_ceilings() -> Ceilings:
    return Ceilings(1e12, 1e11)


def green() -> Bench:
    return Bench("a test", [], EFFORT, commit="abc")


def timed(*paths: Path, captures: bool = True) -> Bench:
    return run_benchmark(green(), [TINY], paths, CPU, FakeClock(captures), fixed_ceilings)


def test_every_measure_of_every_way_is_timed() -> None:
    bench = timed(GOLDEN)
    assert [(row.measure, row.path) for row in bench.rows] == [
        (measure.name, path) for measure in MEASURES for path in ("composite", "golden")
    ]
    assert {row.status for row in bench.rows} == {"ok"}
    row = bench.rows[1]
    assert row.mode == "graph"
    assert row.ratios == (1.0, 1.0)
    assert row.extra_bytes == 1000
    assert row.rows_per_s == pytest.approx(TINY.rows / row.median)
    assert [len(samples) for samples in row.samples] == [4, 4]
    assert bench.exit_code == 0


def test_eager_where_one_side_cannot_be_captured() -> None:
    assert {row.mode for row in timed(GOLDEN, captures=False).rows} == {"eager"}


def test_rounds_alternate_between_the_two_sides() -> None:
    clock = FakeClock()
    racing._rounds(ours := lambda: 1, theirs := lambda: 2, clock, Effort(3, 5, 1e9))
    assert clock.calls == [ours, theirs, *[theirs, ours] * 3]


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.name)
def test_what_is_timed_is_the_layer(measure: workloads.Measure) -> None:
    workload = Workload.draw(TINY, CPU, torch.float32)
    side = racing._ready(workload, measure, GOLDEN, WallClock())
    expected = racing._ready(workload, measure, COMPOSITE, WallClock())
    leaves = {STEP: 3, BASE: 1}.get(measure, 0)
    assert len(side.results) == 1 + leaves
    assert racing._distance(side.results, expected.results) < 1e-5
    rows = TINY.tokens if measure is STEP else TINY.rows
    if measure.backward:
        assert side.results[1].shape == (rows, TINY.K)


def test_upstream_gradients_are_random() -> None:
    workload = Workload.draw(TINY, CPU, torch.float32)
    assert workload.grad_out.std() > 0.5


def broken(*, inputs: Tensor, **operands: Any) -> Tensor:
    return mxref.parallel_linear_lora(inputs, **operands) * 1.05


def test_a_way_that_disagrees_gets_no_numbers() -> None:
    bench = timed(Path("broken", "", broken))
    rows = [row for row in bench.rows if row.path == "broken"]
    assert all(row.status.startswith("disagrees with the composite by 0.05") for row in rows)
    assert bench.exit_code == 1
    assert "median" not in benchmark_report.as_json(bench)["rows"][1]


def out_of_memory(**operands: Any) -> Tensor:
    raise torch.OutOfMemoryError("no room")


def unlucky(**operands: Any) -> Tensor:
    raise RuntimeError("out of luck\nin two lines")


def test_out_of_memory_is_a_result() -> None:
    bench = timed(Path("large", "", out_of_memory))
    assert {row.status for row in bench.rows if row.path == "large"} == {"out of memory"}
    assert bench.exit_code == 0


def test_operands_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workload, "draw", lambda *_: out_of_memory())
    assert {row.status for row in timed(GOLDEN).rows} == {"out of memory"}


def test_a_peer_may_fail_and_we_may_not() -> None:
    peer = Path("peer", "", unlucky, ours=False)
    statuses = {row.status for row in timed(peer).rows if row.path == "peer"}
    assert statuses == {"failed: RuntimeError: out of luck"}
    with pytest.raises(RuntimeError, match="out of luck"):
        timed(Path("ours", "", unlucky))


def test_no_speed_on_a_red_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "decode_steps", lambda device: [])
    gates = gate_paths([Path("broken", "", broken)], CPU)
    bench = Bench("a test", gates, EFFORT)
    clock = FakeClock()
    run_benchmark(bench, [TINY], [GOLDEN], CPU, clock, fixed_ceilings)
    assert (bench.green, bench.rows, clock.calls, bench.exit_code) == (False, [], [], 1)
    console = Console(record=True, width=120)
    benchmark_report.print_bench(bench, console)
    assert "The gate is red: nothing was timed" in console.export_text()


def test_the_gate_judges_each_of_our_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "decode_steps", lambda device: [])
    results = gate_paths([GOLDEN, Path("peer", "", unlucky, ours=False)], CPU)
    assert [result.candidate.name for result in results] == ["path: golden", "mxref.kernels"]
    assert results[0].exit_code == 0
    assert {finding.guard for finding in results[0].findings} == {"integer", "interval"}


def test_strategies_compute_the_layer(device: torch.device) -> None:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    workload = Workload.draw(Shape("tiny", 2, 64, 32, 4, 1, rank=4), device, dtype)
    expected = racing._ready(workload, STEP, COMPOSITE, WallClock()).results
    paths = our_paths()
    assert [path.name for path in paths] == ["dense", "strategy A", "strategy B", "automatic"]
    for path in paths:
        assert racing._distance(racing._ready(workload, STEP, path, WallClock()).results, expected) < racing.AGREEMENT


class TestWorkloads:
    def test_limit(self) -> None:
        """The formula by hand: bound by bytes when thin, by arithmetic when thick."""
        ceilings = Ceilings(800e12, 3e12)
        thin = Workload.draw(Shape("thin", 4, 64, 32, 3, 2), CPU)
        packed = thin.active * 64 * 32 * 17 / 32 + 3 * 64 * 2 + 6 * 32 * 2
        assert ceilings.seconds(*thin.least(BASE_FORWARD)) == pytest.approx(packed / 3e12)
        assert ceilings.seconds(*thin.least(BASE)) == pytest.approx(2 * packed / 3e12)
        thick = Ceilings(1e3, 3e12)
        assert thick.seconds(*thin.least(STEP)) == pytest.approx(2 * 2 * 6 * 64 * 32 / 1e3)
        assert thin.least(FORWARD) == thin.least(BASE_FORWARD)

    def test_work_counts_adapters(self) -> None:
        workload = Workload.draw(TINY, CPU)
        products = {"base": 2, "lora": 2 * TINY.rows * 4 * (64 + 32)}
        assert workload.flops(STEP) == workload.flops(BASE) + 3 * products["lora"]
        assert workload.flops(FORWARD) == workload.flops(BASE_FORWARD) + products["lora"]

    def test_routings(self) -> None:
        generator = torch.Generator().manual_seed(0)
        balanced = Shape("b", 16, 64, 32, 32, 4, "balanced").route(generator)
        assert torch.bincount(balanced.flatten(), minlength=16).tolist() == [8] * 16
        few = Shape("f", 32, 64, 32, 40, 8, "ten_active").route(generator)
        assert few.unique().numel() == 10
        for choice in (balanced, few):
            assert all(row.unique().numel() == row.numel() for row in choice)

    def test_the_issue_s_shapes(self) -> None:
        assert [shape.rows for shape in workloads.CASES] == [32768, 32768, 2048, 8192, 32768, 131072, 32768, 32768]
        assert {shape.rank for shape in (*workloads.CASES, *workloads.LARGE)} == {16}

    def test_dense_weights_are_the_packed_ones(self) -> None:
        workload = Workload.draw(TINY, CPU, torch.float32)
        weights = workload.problem.expert_weights
        assert isinstance(weights, mxref.MXWeights)
        assert torch.equal(workload.dense, mxref.decode_mxfp4(weights, torch.float32).mT)
        assert workload.dense.is_contiguous()


def test_wall_clock() -> None:
    ticks = itertools.accumulate([1, 0.5, 1, 0.25])
    assert WallClock(lambda: next(ticks)).sample(lambda: None, 2) == [0.5, 0.25]


def test_ceilings() -> None:
    ceilings = measure_ceilings(FakeClock(), CPU, side=8, copy_bytes=64, samples=1)
    assert (ceilings.matmul, ceilings.copy) == (2 * 8**3, 128)
    assert Ceilings(2, 3).best(Ceilings(1, 4)) == Ceilings(2, 4)
    assert Ceilings(2, 3).drift(Ceilings(2, 4)) == pytest.approx(0.25)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(racing, "_release", lambda: None)


@pytest.mark.usefixtures("gpu")
class TestReport:
    def test_evidence_and_readme(self, tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
        bench = timed(GOLDEN, Path("large", "", out_of_memory))
        path = benchmark_report.record(bench, tmp_path / "evidence")
        assert path == tmp_path / "evidence" / "nvidia-h200" / "bench.json"
        kept = evidence.load(path)
        assert kept["gpu"] == "NVIDIA H200"
        assert [file.read_bytes() for file in (path.parent / "history").iterdir()] == [path.read_bytes()]
        page = path.with_suffix(".md").read_text()
        assert page == benchmark_report.as_markdown(kept)
        assert "| tiny | golden | " in page
        assert "| tiny | large | out of memory |" in page

        readme = tmp_path / "README.md"
        readme.write_text(f"before\n{benchmark_report.BEGIN}\nold\n{benchmark_report.END}\nafter\n")
        assert benchmark_report.update_readme(readme, tmp_path / "evidence")
        text = readme.read_text()
        assert text == f"before\n{benchmark_report.readme_block(tmp_path / 'evidence')}\nafter\n"
        for said in (bench.started[:10], "NVIDIA H200", f"torch {kept['versions']['torch']}", "| tiny | ", "1.00 ("):
            assert said in text
        readme.write_text("no markers")
        assert not benchmark_report.update_readme(readme, tmp_path / "evidence")

    def test_what_failed_is_no_evidence(self, tmp_path: File) -> None:
        bench = green()
        bench.rows = [Row("tiny", "step", "ours", True, 3.0, "disagrees")]
        with pytest.raises(ValueError, match="not passed"):
            benchmark_report.record(bench, tmp_path)


def test_terminal_shows_what_was_measured() -> None:
    console = Console(record=True, width=160)
    benchmark_report.print_bench(timed(GOLDEN), console)
    text = console.export_text()
    assert "÷ composite" in text
    assert text.count("golden") == len(MEASURES)
    assert json.loads(benchmark_report.dumps(green()))["rows"] == []


def test_the_readme_shows_the_evidence() -> None:
    readme = EVIDENCE.parent.parent / "README.md"
    if not any(EVIDENCE.glob("*/bench.json")):
        pytest.skip("no GPU's benchmark is recorded")
    assert benchmark_report.readme_block() in readme.read_text(encoding="utf-8"), "stale; run: mxref bench --readme"


@pytest.mark.parametrize(
    "arguments", [["--record", "--quick"], ["--record", "--shape", "thin"], [], ["--quick", "--large"]]
)
def test_wrong_use(arguments: Sequence[str], capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err.startswith("mxref: error: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: they would run")
def test_without_a_gpu_the_timings_are_skipped() -> None:
    root = File(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "pytest", "tests/bench", "-q", "-p", "no:cacheprovider", "-k", "thin or samples"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"1 passed, 20 skipped, \d+ deselected", done.stdout), done.stdout


def test_time_shape_reads_the_wall_on_a_cpu() -> None:
    rows = time_shape(TINY, [GOLDEN], CPU, WallClock(), Effort(2, 3, 1e-9))
    assert {(row.mode, row.extra_bytes) for row in rows} == {("eager", None)}
    assert all(row.median > 0 and row.eager == pytest.approx(row.median) for row in rows)
