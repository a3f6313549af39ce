"""The benchmark's plumbing on a CPU, with the golden model in the kernels' place and a clock that is told the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from benchmarks import (
    BASE,
    BASE_DX,
    BASE_FORWARD,
    CPU,
    DECODE,
    DECODER,
    EFFORT,
    FORWARD,
    GOLDEN,
    SPARSE,
    STEP,
    TINY,
    FakeClock,
    WallClock,
    fixed_ceilings,
    golden_decoder,
    out_of_memory,
    timed,
)
from rich.console import Console
from torch import Tensor

import mxref
from mxref.verification.bench import benchmark, pairs, paths, report, workloads
from mxref.verification.bench.benchmark import Bench, gate_paths, run_benchmark
from mxref.verification.bench.pairs import Effort, runnable, time_shape
from mxref.verification.bench.paths import COPY, DEQUANTISED, Path, every_path, our_paths, reference
from mxref.verification.bench.timing import EventClock
from mxref.verification.bench.workloads import MEASURES, Measure, Shape, Workload
from mxref.verification.cases.small import usual_dtype
from mxref.verification.cli import main


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
    pairs._rounds(ours := lambda: 1, theirs := lambda: 2, clock, Effort(3, 5, 1e9))
    assert clock.calls == [ours, theirs, *[theirs, ours] * 3]


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.name)
def test_what_is_timed_is_the_layer(measure: workloads.Measure) -> None:
    workload = Workload.draw(TINY, CPU, torch.float32)
    side = pairs._ready(workload, measure, DECODER if measure is DECODE else GOLDEN, WallClock())
    expected = pairs._ready(workload, measure, reference(measure), WallClock())
    assert pairs.distance(side.results, expected.results) < 1e-5
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
        rows = pairs._time_measure(workload, BASE_DX, [Path("counted", "", layer)], clock, EFFORT)
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
    monkeypatch.setattr(benchmark, "decode_cases", lambda scope: [])
    gates = gate_paths([Path("broken", "", broken)], CPU)
    bench = Bench("a test", gates, EFFORT)
    clock = FakeClock()
    run_benchmark(bench, [TINY], [GOLDEN], CPU, clock, fixed_ceilings)
    assert (bench.green, bench.rows, clock.calls, bench.exit_code) == (False, [], [], 1)
    console = Console(record=True, width=120)
    report.print_bench(bench, console)
    assert "The gate is red: nothing was timed" in console.export_text()


def test_the_gate_judges_each_of_our_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "decode_cases", lambda scope: [])
    results = gate_paths([GOLDEN, DECODER, Path("peer", "", unlucky, ours=False)], CPU)
    assert [result.candidate.name for result in results] == ["path: golden", "mxref.kernels"]
    assert results[0].exit_code == 0
    assert {finding.check for finding in results[0].findings} == {"integer", "interval"}


def draw(shape: Shape, device: torch.device) -> Workload:
    return Workload.draw(shape, device, usual_dtype(device.type))


def distance(workload: Workload, measure: Measure, path: Path) -> float:
    """From the reference."""
    expected = runnable(workload, measure, reference(measure))()
    return pairs.distance(runnable(workload, measure, path)(), expected)


def test_strategies_compute_the_layer(device: torch.device) -> None:
    workload = draw(Shape("tiny", 2, 64, 32, 4, 1, rank=4), device)
    *strategies, decoding = our_paths()
    assert [path.name for path in strategies] == ["dense", "strategy A", "strategy B", "automatic", "repacked"]
    for path in strategies:
        assert distance(workload, STEP, path) < pairs.AGREEMENT
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
        assert distance(draw(SPARSE, device), measure, DEQUANTISED) < pairs.AGREEMENT

    def test_decodes_the_active_experts_in_each_pass_and_keeps_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        decoded: list[Tensor] = []

        def dequantize(weights: mxref.MXWeights, experts: Tensor, dtype: torch.dtype) -> Tensor:
            decoded.append(experts)
            return mxref.decode_mxfp4(weights, dtype)

        def save(saved: Tensor) -> Tensor:
            assert saved.ndim == 1, "only index tensors are kept"
            return saved

        monkeypatch.setattr(paths, "dequantize_experts", dequantize)
        workload = Workload.draw(SPARSE, CPU, torch.float32)
        run = runnable(workload, BASE, DEQUANTISED)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda kept: kept):
            run()
        active = {int(e) for e in workload.problem.sorted_expert_idxs}
        expected = [e if e in active else SPARSE.experts for e in range(SPARSE.experts)]
        assert [experts.tolist() for experts in decoded] == [expected, expected]

    def test_is_always_timed_and_is_not_ours(self) -> None:
        assert DEQUANTISED in every_path()
        assert not DEQUANTISED.ours


@pytest.mark.gpu
class TestOnTheGPU:
    SMALL = Shape("small", 8, 128, 64, 64, 2)

    @pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.name)
    def test_every_way_is_captured_and_its_replay_computes(self, measure: Measure, device: torch.device) -> None:
        clock = EventClock(device)
        with clock.stream():
            workload = draw(self.SMALL, device)
            for path in (reference(measure), *every_path()):
                if path.covers(measure) and path is not COPY:
                    run = runnable(workload, measure, path)
                    expected = [result.clone() for result in run()]
                    captured = clock.capture(run)
                    assert captured is not None, path.name
                    for output in captured.outputs:
                        output.zero_()
                    captured.replay()
                    assert pairs.distance(captured.outputs, expected) < pairs.AGREEMENT, path.name

    def test_memory_beyond_the_results(self, device: torch.device) -> None:
        clock, size = EventClock(device), 64 << 20

        def run() -> Sequence[Tensor]:
            scratch = torch.zeros(3 * size, dtype=torch.uint8, device=device)
            return (scratch[:size].clone(),)

        # A block that the allocator had at hand may be larger than what is asked for, by less than a MiB.
        assert clock.extra_bytes(run) == pytest.approx(3 * size, abs=2 << 20)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--record", "--quick"], "--record keeps a whole benchmark"),
        (["--record", "--shape", "thin"], "--record keeps a whole benchmark"),
        (["--shape", "none"], "--shape none matches none of: dense, "),
        (["--quick", "--large"], "not allowed with"),
        (["--readme"], "is now: mxref evidence --readme"),
        ([], "no CUDA GPU"),
    ],
)
def test_wrong_use(arguments: Sequence[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_time_shape_reads_the_wall_on_a_cpu() -> None:
    rows = time_shape(TINY, [GOLDEN], CPU, WallClock(), Effort(2, 3, 1e-9))
    assert {(row.mode, row.extra_bytes) for row in rows} == {("eager", None)}
    assert all(row.median > 0 and row.eager == pytest.approx(row.median) for row in rows)
