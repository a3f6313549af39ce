"""The benchmark's plumbing on a CPU, with the golden model in the kernels' place and a clock that is told the time."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import mxref
from mxref.verification import evidence
from mxref.verification.bench import benchmark, first_call, paths, racing, report, timing, workloads
from mxref.verification.bench.benchmark import Bench, gate_paths, run_benchmark
from mxref.verification.bench.paths import COPY, DEQUANTISED, Path, every_path, our_paths, reference
from mxref.verification.bench.racing import Effort, Row, runnable, time_shape
from mxref.verification.bench.timing import Captured, Ceilings, EventClock, WallClock, measure_ceilings
from mxref.verification.bench.workloads import MEASURES, Measure, Shape, Workload
from mxref.verification.cli import main
from mxref.verification.options import EVIDENCE

CPU = torch.device("cpu")
TINY = Shape("tiny", 4, 64, 32, 6, 2, rank=4)
SPARSE = Shape("sparse", 8, 64, 32, 3, 1, rank=4)
STEP, FORWARD, BASE, BASE_FORWARD, BASE_DX, DECODE = MEASURES
EFFORT = Effort(rounds=2, samples=4, seconds=1e9)
GOLDEN = Path("golden", "the golden model", mxref.parallel_linear_lora)


def golden_decoder(*, expert_weights: mxref.MXWeights, expert_offsets: Tensor, inputs: Tensor, **rest: Any) -> Tensor:
    active = torch.diff(expert_offsets, prepend=expert_offsets.new_zeros(1)) > 0
    return mxref.decode_mxfp4(expert_weights, inputs.dtype)[active]


DECODER = Path("decoder", "the golden decode", golden_decoder, parts=("decode",))


class FakeClock:
    """Captures everything; a call takes what `costs` says of the path that it runs, in turn."""

    def __init__(self, captures: bool = True) -> None:
        self.captures = captures
        self.calls: list[Any] = []
        self.inside = False

    @contextmanager
    def stream(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

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
    bench = timed(GOLDEN, DECODER)
    assert [(row.measure, row.reference, row.path) for row in bench.rows] == [
        *((measure.name, "composite", path) for measure in MEASURES[:-1] for path in ("composite", "golden")),
        *(("decode", "copy", path) for path in ("copy", "decoder")),
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
    side = racing._ready(workload, measure, DECODER if measure is DECODE else GOLDEN, WallClock())
    expected = racing._ready(workload, measure, reference(measure), WallClock())
    assert racing._distance(side.results, expected.results) < 1e-5
    output, whole, rows = (
        [(TINY.rows, TINY.N)],
        [(TINY.tokens, TINY.K), (16, TINY.K), (TINY.N, 16)],
        (TINY.rows, TINY.K),
    )
    assert [tuple(result.shape) for result in side.results] == {
        STEP: output + whole,
        FORWARD: output,
        BASE: [*output, rows],
        BASE_FORWARD: output,
        BASE_DX: [rows],
        DECODE: [(workload.active, TINY.N, TINY.K)],
    }[measure]


def test_a_backward_alone_has_its_forward_before_the_clock_and_on_its_stream() -> None:
    clock = FakeClock()
    forwards: list[tuple[bool, int]] = []

    def layer(**operands: Any) -> Tensor:
        forwards.append((clock.inside, len(clock.calls)))
        return mxref.parallel_linear_lora(**operands)

    with clock.stream():
        workload = Workload.draw(TINY, CPU, torch.float32)
        rows = racing._time_measure(workload, BASE_DX, [Path("counted", "", layer)], clock, EFFORT)
    assert [row.status for row in rows] == ["ok", "ok"]
    composite_alone = 2 * (2 + 2 * EFFORT.rounds)  # eager and captured, each with its probe
    assert forwards == [(True, composite_alone)]
    assert not clock.inside


def test_everything_runs_on_the_clock_s_stream() -> None:
    clock = FakeClock()
    seen: set[bool] = set()

    def layer(**operands: Any) -> Tensor:
        seen.add(clock.inside)
        return mxref.parallel_linear_lora(**operands)

    time_shape(TINY, [Path("seen", "", layer)], CPU, clock, EFFORT)
    assert seen == {True}


def test_upstream_gradients_are_random() -> None:
    workload = Workload.draw(TINY, CPU, torch.float32)
    assert workload.grad_out.std() > 0.5


def broken(*, inputs: Tensor, **operands: Any) -> Tensor:
    return mxref.parallel_linear_lora(inputs, **operands) * 1.05


def test_a_way_that_disagrees_gets_no_numbers() -> None:
    bench = timed(Path("broken", "", broken))
    rows = [row for row in bench.rows if row.path == "broken"]
    assert len(rows) == 5
    assert all(row.status.startswith("disagrees with the composite by 0.05") for row in rows)
    assert bench.exit_code == 1
    assert "median" not in report.as_json(bench)["rows"][1]


def test_a_decoder_that_disagrees_gets_no_numbers() -> None:
    wrong = replace(DECODER, call=lambda **operands: 1.05 * golden_decoder(**operands))
    *_, row = timed(wrong).rows
    assert row.status.startswith("disagrees with the copy by 0.05")


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
    report.print_bench(bench, console)
    assert "The gate is red: nothing was timed" in console.export_text()


def test_the_gate_judges_each_of_our_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "decode_steps", lambda device: [])
    results = gate_paths([GOLDEN, DECODER, Path("peer", "", unlucky, ours=False)], CPU)
    assert [result.candidate.name for result in results] == ["path: golden", "mxref.kernels"]
    assert results[0].exit_code == 0
    assert {finding.guard for finding in results[0].findings} == {"integer", "interval"}


def draw(shape: Shape, device: torch.device) -> Workload:
    return Workload.draw(shape, device, torch.float32 if device.type == "cpu" else torch.bfloat16)


def distance(workload: Workload, measure: Measure, path: Path) -> float:
    """From the reference."""
    expected = runnable(workload, measure, reference(measure))()
    return racing._distance(runnable(workload, measure, path)(), expected)


def test_strategies_compute_the_layer(device: torch.device) -> None:
    workload = draw(Shape("tiny", 2, 64, 32, 4, 1, rank=4), device)
    *strategies, decoding = our_paths()
    assert [path.name for path in strategies] == ["dense", "strategy A", "strategy B", "automatic"]
    for path in strategies:
        assert distance(workload, STEP, path) < racing.AGREEMENT
    assert (decoding.name, decoding.parts) == ("dequantize_experts", ("decode",))


def test_decoding_is_of_the_active_experts_to_the_bit(device: torch.device) -> None:
    workload = draw(SPARSE, device)
    assert workload.active < SPARSE.experts
    assert distance(workload, DECODE, our_paths()[-1]) == 0.0


def test_the_copy_moves_as_many_bytes_as_decoding() -> None:
    workload = Workload.draw(SPARSE, CPU)
    prepared = COPY.prepare(workload.operands(DECODE), lambda: workload.dense)
    assert prepared["source"].nbytes + prepared["target"].nbytes == workload.bytes(DECODE)
    prepared["target"].fill_(0)
    COPY.call(**prepared)
    assert torch.equal(prepared["target"], prepared["source"])


class TestDequantised:
    """The composite on weights that are decoded for it."""

    @pytest.mark.parametrize("measure", [BASE, BASE_FORWARD, BASE_DX], ids=lambda measure: measure.name)
    def test_computes_the_base_products(self, measure: Measure, device: torch.device) -> None:
        assert DEQUANTISED.covers(measure)
        assert distance(draw(SPARSE, device), measure, DEQUANTISED) < racing.AGREEMENT

    def test_decodes_the_active_experts_in_each_pass_and_keeps_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        decoded: list[Tensor] = []

        def dequantize(weights: mxref.MXWeights, experts: Tensor, dtype: torch.dtype) -> Tensor:
            decoded.append(experts)
            return mxref.decode_mxfp4(weights, dtype)

        def save(saved: Tensor) -> Tensor:
            assert saved.ndim == 1, "only index tensors are kept"
            return saved

        monkeypatch.setattr(paths, "_dequantize", dequantize)
        workload = Workload.draw(SPARSE, CPU, torch.float32)
        run = runnable(workload, BASE, DEQUANTISED)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda kept: kept):
            run()
        active = {int(e) for e in workload.problem.sorted_expert_idxs}
        expected = [e if e in active else SPARSE.experts for e in range(SPARSE.experts)]
        assert [experts.tolist() for experts in decoded] == [expected, expected]

    def test_is_always_timed_and_is_not_ours(self) -> None:
        assert DEQUANTISED in every_path(installed=False)
        assert not DEQUANTISED.ours


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
        assert thin.least(FORWARD) == thin.least(BASE_FORWARD) == thin.least(BASE_DX)
        decoding = thin.active * 64 * 32 * (17 / 32 + 2)
        assert thin.least(DECODE) == (0.0, pytest.approx(decoding))
        assert ceilings.seconds(*thin.least(DECODE)) == pytest.approx(decoding / 3e12)

    def test_work_counts_adapters(self) -> None:
        workload = Workload.draw(TINY, CPU)
        products = {"base": 2, "lora": 2 * TINY.rows * 4 * (64 + 32)}
        assert workload.flops(STEP) == workload.flops(BASE) + 3 * products["lora"]
        assert workload.flops(FORWARD) == workload.flops(BASE_FORWARD) + products["lora"]
        assert workload.flops(BASE_DX) == workload.flops(BASE_FORWARD)
        assert workload.flops(DECODE) == 0.0

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


class TestExtraMemory:
    """What a call holds at its peak, beyond what was there and what it returns."""

    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> EventClock:
        """A GPU's clock whose allocator says that 100 bytes were there, at most 1000 during the call."""
        for name in ("synchronize", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 1000)
        clock = EventClock.__new__(EventClock)
        clock._device = CPU
        return clock

    def allocated(self, monkeypatch: pytest.MonkeyPatch, before: int, after: int) -> None:
        answers = iter((before, after))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: next(answers))

    def test_results_are_left_out_each_storage_once(self, clock: EventClock, monkeypatch: pytest.MonkeyPatch) -> None:
        y, gradient = torch.empty(40, dtype=torch.uint8), torch.empty(25, dtype=torch.float32)
        self.allocated(monkeypatch, 100, 900)
        assert clock.extra_bytes(lambda: (y, y[:10].view(2, 5), gradient)) == 1000 - 100 - 140

    def test_what_stays_behind_and_is_no_result_counts(self, clock: EventClock, monkeypatch: Any) -> None:
        self.allocated(monkeypatch, 100, 700)
        assert clock.extra_bytes(lambda: (torch.empty(40, dtype=torch.uint8),)) == 1000 - 100 - 40

    def test_results_that_were_there_before_are_no_part_of_it(self, clock: EventClock, monkeypatch: Any) -> None:
        self.allocated(monkeypatch, 100, 100)
        assert clock.extra_bytes(lambda: (torch.empty(40, dtype=torch.uint8),)) == 1000 - 100


@pytest.mark.gpu
class TestOnTheGPU:
    SMALL = Shape("small", 8, 128, 64, 64, 2)

    @pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.name)
    def test_every_way_is_captured_and_its_replay_computes(self, measure: Measure, device: torch.device) -> None:
        clock = EventClock(device)
        with clock.stream():
            workload = draw(self.SMALL, device)
            for path in (reference(measure), *every_path(installed=False)):
                if path.covers(measure) and path is not COPY:
                    run = runnable(workload, measure, path)
                    expected = [result.clone() for result in run()]
                    captured = clock.capture(run)
                    assert captured is not None, path.name
                    for output in captured.outputs:
                        output.zero_()
                    captured.replay()
                    assert racing._distance(captured.outputs, expected) < racing.AGREEMENT, path.name

    def test_memory_beyond_the_results(self, device: torch.device) -> None:
        clock, size = EventClock(device), 64 << 20

        def run() -> Sequence[Tensor]:
            scratch = torch.zeros(3 * size, dtype=torch.uint8, device=device)
            return (scratch[:size].clone(),)

        # A block that the allocator had at hand may be larger than what is asked for, by less than a MiB.
        assert clock.extra_bytes(run) == pytest.approx(3 * size, abs=2 << 20)


class TestFirstCall:
    def test_a_whole_step_of_a_fresh_process(self) -> None:
        begin = time.perf_counter()
        seconds = first_call.first_call(Shape("tiny", 2, 64, 32, 4, 1, rank=4), CPU)
        assert 0 < seconds < time.perf_counter() - begin

    def test_with_an_empty_cache_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        caches = []

        def run(command: Sequence[str], env: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
            caches.append(env["TRITON_CACHE_DIR"])
            assert os.listdir(caches[0]) == []
            return subprocess.CompletedProcess(command, 0, "1.5\n", "")

        monkeypatch.setattr(subprocess, "run", run)
        assert first_call.first_call(TINY, CPU) == 1.5
        assert not File(caches[0]).exists()

    def test_a_process_that_fails_says_why(self) -> None:
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            first_call.first_call(replace(TINY, experts=0, routing="balanced"), CPU)

    def test_both_passes_count_and_drawing_does_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = [0.0]

        def later(seconds: float) -> None:
            clock[0] += seconds

        def layer(**operands: Any) -> Tensor:
            later(1.0)
            y = mxref.parallel_linear_lora(**operands)
            y.register_hook(lambda gradient: later(10.0))
            return y

        draw = Workload.draw
        monkeypatch.setattr(Workload, "draw", lambda *arguments: (later(100.0), draw(*arguments))[1])
        assert first_call.first_step(TINY, CPU, Path("slow", "", layer), now=lambda: clock[0]) == 11.0


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
        path = report.record(bench, tmp_path / "evidence")
        assert path == tmp_path / "evidence" / "nvidia-h200" / "bench.json"
        kept = evidence.load(path)
        assert kept["gpu"] == "NVIDIA H200"
        assert [file.read_bytes() for file in (path.parent / "history").iterdir()] == [path.read_bytes()]
        page = path.with_suffix(".md").read_text()
        assert page == report.as_markdown(kept)
        assert "| tiny | golden | " in page
        assert "| tiny | large | out of memory |" in page

        readme = tmp_path / "README.md"
        readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
        assert report.update_readme(readme, tmp_path / "evidence")
        text = readme.read_text()
        assert text == f"before\n{report.readme_block(tmp_path / 'evidence')}\nafter\n"
        for said in (bench.started[:10], "NVIDIA H200", f"torch {kept['versions']['torch']}", "| tiny | ", "1.00 ("):
            assert said in text
        readme.write_text("no markers")
        assert not report.update_readme(readme, tmp_path / "evidence")

    def test_single_products_beside_the_best_of_others(self, tmp_path: File) -> None:
        ways = [replace(GOLDEN, name="automatic"), replace(GOLDEN, name="peer", ours=False)]
        entry = self.recorded(tmp_path, *ways, DEQUANTISED, replace(DECODER, name="dequantize_experts"))
        ratios = {"automatic": 0.4, "peer": 1.6, "dequantise + grouped_mm": 0.8, "dequantize_experts": 1.25}
        for row in entry["rows"]:
            row |= {"ratio": ratios.get(row["path"], 1.0), "limit_ratio": 3.0}
        text = report.as_markdown(entry)
        assert "over the best of peer and dequantise + grouped_mm" in text
        assert "| shape | forward | dX | decoding |" in text
        assert "| tiny | 0.50 (3.00) | 0.50 (3.00) | 1.25 (3.00) |" in text
        for row in entry["rows"]:
            if (row["measure"], row["path"]) == ("base dX", "dequantise + grouped_mm"):
                row["status"] = "out of memory"
        assert "| tiny | 0.50 (3.00) | 0.25 (3.00) | 1.25 (3.00) |" in report.as_markdown(entry)

    def test_first_call_and_memory_of_the_dense_step(self, tmp_path: File) -> None:
        entry = self.recorded(tmp_path, replace(GOLDEN, name="automatic"), first_call=12.34, shape="dense")
        assert entry["first_call_seconds"] == 12.34
        for row in entry["rows"]:
            row["extra_bytes"] = 86e6 if row["path"] == "automatic" else 284e6
        text = report.as_markdown(entry)
        assert "First training step of a fresh process, every kernel still to be compiled: 12.3 s." in text
        said = "Extra memory of the dense shape's step, beyond the operands and the results: automatic 86 MB, "
        assert f"{said}composite 284 MB." in text
        assert "Extra memory is the peak beyond the operands and the results." in text

    def test_early_records_render_without_what_they_lack(self, tmp_path: File) -> None:
        entry = self.recorded(tmp_path, replace(GOLDEN, name="automatic"))
        for lacking in ("first_call_seconds", "extra_beyond"):
            del entry[lacking]
        entry["rows"] = [row for row in entry["rows"] if row["measure"] not in ("base dX", "decode")]
        for row in entry["rows"]:
            del row["reference"]
        text = report.as_markdown(entry)
        assert "÷ composite" in text
        assert "the peak beyond the operands, results included." in text
        assert not any(said in text for said in ("Single base products", "First training step", "the dense shape's"))

    def recorded(self, root: File, *ways: Path, first_call: float | None = None, shape: str = "tiny") -> dict[str, Any]:
        bench = run_benchmark(green(), [replace(TINY, name=shape)], ways, CPU, FakeClock(), fixed_ceilings)
        bench.first_call = first_call
        return evidence.load(report.record(bench, root))

    def test_what_failed_is_no_evidence(self, tmp_path: File) -> None:
        bench = green()
        bench.rows = [Row("tiny", "step", "ours", "composite", True, 3.0, "disagrees")]
        with pytest.raises(ValueError, match="not passed"):
            report.record(bench, tmp_path)


def test_terminal_shows_what_was_measured() -> None:
    console = Console(record=True, width=160)
    bench = timed(GOLDEN)
    bench.first_call = 12.34
    report.print_bench(bench, console)
    text = console.export_text()
    assert "÷ composite" in text
    assert "÷ copy" in text
    assert text.count("golden") == len(MEASURES) - 1
    assert "First training step of a fresh process, every kernel still to be compiled: 12.3 s." in text
    assert json.loads(report.dumps(green()))["rows"] == []


def test_the_readme_shows_the_evidence() -> None:
    readme = EVIDENCE.parent.parent / "README.md"
    if not any(EVIDENCE.glob("*/bench.json")):
        pytest.skip("no GPU's benchmark is recorded")
    assert report.readme_block() in readme.read_text(encoding="utf-8"), "stale; run: mxref bench --readme"


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
    assert re.search(r"1 passed, 30 skipped, \d+ deselected", done.stdout), done.stdout


def test_time_shape_reads_the_wall_on_a_cpu() -> None:
    rows = time_shape(TINY, [GOLDEN], CPU, WallClock(), Effort(2, 3, 1e-9))
    assert {(row.mode, row.extra_bytes) for row in rows} == {("eager", None)}
    assert all(row.median > 0 and row.eager == pytest.approx(row.median) for row in rows)
