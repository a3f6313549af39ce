"""Products over rows per expert with their chart, the host's time of one eager step, and what a GPU sustains."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path as File
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks import BASE, BASE_DX, BASE_FORWARD, CPU, EFFORT, GOLDEN, STEP, TINY, FakeClock, fixed_ceilings, green
from foreign_packages import on_path, write_humming, write_unsloth

from mxref.verification.bench import paths
from mxref.verification.bench.benchmark import run_benchmark
from mxref.verification.bench.host import host_times
from mxref.verification.bench.pairs import time_shape
from mxref.verification.bench.paths import about_peers, peers
from mxref.verification.bench.report import as_json, as_markdown
from mxref.verification.bench.rows import PRODUCTS, ROWS, rows_chart
from mxref.verification.bench.sustained import Reading, readings, sustained
from mxref.verification.bench.workloads import Workload
from mxref.verification.cli import main
from mxref.verification.cli.own import bench as cli_bench
from mxref.verification.cli.own import bench_host, bench_sustained
from mxref.verification.records.readme import blocks
from mxref.verification.records.record import write

FORWARD_ONLY = replace(GOLDEN, name="humming, MXFP4", ours=False, backward=False, parts=("base",))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(cli_bench, "choose_device", lambda *_, **__: torch.device("cuda"))


def measured() -> dict[str, Any]:
    """Both products of two tiny shapes, as plain data."""
    ways = [replace(GOLDEN, name="automatic"), FORWARD_ONLY]
    shapes = [TINY, replace(TINY, name="more", tokens=24)]
    bench = run_benchmark(green(), shapes, ways, CPU, FakeClock(), fixed_ceilings, measures=PRODUCTS)
    return as_json(bench)


def test_powers_of_two_and_every_expert_with_as_many_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    assert [shape.rows / shape.experts for shape in ROWS] == [2**i for i in range(3, 13)]
    counts = torch.bincount(ROWS[0].route(generator).view(-1), minlength=ROWS[0].experts)
    assert set(counts.tolist()) == {8}


def test_only_the_products_are_timed_and_dx_only_of_what_has_one() -> None:
    rows = [row for row in measured()["rows"] if row["shape"] == "tiny"]
    assert [(row["measure"], row["path"]) for row in rows] == [
        *(("base forward", path) for path in ("composite", "automatic", "humming, MXFP4")),
        *(("base dX", path) for path in ("composite", "automatic")),
    ]
    assert {row["status"] for row in rows} == {"ok"}
    assert [FORWARD_ONLY.covers(measure) for measure in (BASE_FORWARD, BASE, BASE_DX, STEP)] == [
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize("width", [10.0, 4.5])
def test_a_line_a_way_and_the_limit(width: float) -> None:
    record = measured()
    record["rows"][0]["status"] = "out of memory"
    figure = rows_chart(record, width)
    forward, dx = figure.axes
    assert [len(axes.get_lines()) for axes in (forward, dx)] == [4, 3]
    lines = {line.get_label(): line for line in forward.get_lines()}
    assert [len(lines[name].get_xdata()) for name in ("mxref, MXFP4", "torch._grouped_mm, bf16")] == [2, 1]
    ours = [r for r in record["rows"] if (r["measure"], r["path"]) == ("base forward", "automatic")]
    assert list(lines["mxref, MXFP4"].get_ydata()) == [row["limit_ratio"] for row in ours]
    assert set(lines["limit"].get_ydata()) == {1}
    above = dx.get_position().y1 <= forward.get_position().y0
    assert above == (width < 8)


@pytest.mark.usefixtures("gpu")
class TestKept:
    def test_rows_are_kept_with_a_chart_and_shown(self, tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
        ways = [replace(GOLDEN, name="automatic")]
        bench = run_benchmark(green(), [TINY], ways, CPU, FakeClock(), fixed_ceilings, measures=PRODUCTS)
        monkeypatch.setattr(cli_bench, "_measure", lambda arguments, shapes, device: bench)
        root = tmp_path / "evidence"
        assert main(["bench", "--rows", "--out", str(tmp_path), "--record", str(root)]) == 0
        written = {path.name for path in (root / "nvidia-h200").iterdir()}
        assert written == {"rows.json", "rows.png", "rows.svg"}
        assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
        assert "](verification/evidence/nvidia-h200/rows.svg)" in blocks(root)["rows"]

    def test_host_times_are_kept_and_shown(self, tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
        times = [replace(each, ours=3.0, composite=2.0) for each in host_times([TINY], GOLDEN, CPU, count=2)]
        monkeypatch.setattr(bench_host, "gate_paths", lambda *_: [])
        monkeypatch.setattr(bench_host, "host_times", lambda *_, **__: times)
        assert main(["bench", "--host", "--out", str(tmp_path), "--record", str(tmp_path)]) == 0
        assert "| 1.50 |" in blocks(tmp_path)["rows"]

    def test_what_a_gpu_sustains_is_kept_and_shown(self, tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
        found = sustained([TINY], [replace(GOLDEN, name="repacked")], CPU, reported, seconds=0.01)
        monkeypatch.setattr(bench_sustained, "gate_paths", lambda *_: [])
        monkeypatch.setattr(bench_sustained, "readings", lambda _: reported)
        monkeypatch.setattr(bench_sustained, "sustained", lambda *_, **__: found)
        assert main(["bench", "--sustained", "--out", str(tmp_path), "--record", str(tmp_path)]) == 0
        lines = blocks(tmp_path)["rows"].splitlines()
        for product, composite, own in (("forward", *found[:2]), ("dX", *found[2:])):
            (line,) = (line for line in lines if line.startswith(f"| tiny | {product} |"))
            assert line.endswith(f"| 1.50 | 700 | {own.seconds / composite.seconds:.2f} |")

    def test_without_records_there_are_no_figures(self, tmp_path: File) -> None:
        assert "are recorded yet" in blocks(tmp_path)["rows"]

    def test_the_eager_step_stands_beside_the_graph(self, tmp_path: File) -> None:
        data = as_json(
            run_benchmark(green(), [TINY], [replace(GOLDEN, name="automatic")], CPU, FakeClock(), fixed_ceilings)
        )
        data["peers"] = {"axolotl, bf16": "axolotl 0.21, tuned by its own autotuner"}
        for row in data["rows"]:
            ours = row["path"] == "automatic"
            row |= {"eager": 0.0021 if ours else 0.0014, "median": 0.0005 if ours else 0.001}
        path = write("bench", data, torch.device("cuda"), tmp_path, page=as_markdown)
        for text in (path.with_suffix(".md").read_text(), blocks(tmp_path)["bench"]):
            assert "| tiny | 1.40 | 2.10 | 1.50 | 1.00 | 0.50 | 0.50 |" in text
            assert "axolotl, bf16: axolotl 0.21, tuned by its own autotuner." in text


def test_the_host_is_timed_in_turns_and_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    empty: list[bool] = []

    def layer(**operands: Any) -> torch.Tensor:
        called.append("ours")
        empty.append(all(operands[name].grad is None for name in ("inputs", "lora_A", "lora_B")))
        return GOLDEN.call(**operands)

    composite = replace(paths.COMPOSITE, call=lambda **operands: called.append("composite") or layer_of(operands))

    def layer_of(operands: dict[str, Any]) -> torch.Tensor:
        return paths.COMPOSITE.call(**operands)

    monkeypatch.setattr("mxref.verification.bench.host.COMPOSITE", composite)
    (found,) = host_times([TINY], replace(GOLDEN, call=layer), CPU, count=3)
    assert called == (["ours"] * 16 + ["composite"] * 16) * 6
    assert all(empty)
    assert (found.shape, found.rows_per_expert) == ("tiny", TINY.rows / Workload.draw(TINY, CPU).active)
    assert found.ours > 0
    assert found.composite > 0


@contextmanager
def reported() -> Iterator[list[Reading]]:
    """A GPU that begins cool: the first half of its readings is not what it sustains."""
    seen: list[Reading] = []
    yield seen
    seen += [Reading(1980, 200), Reading(1900, 400), Reading(1500, 700), Reading(1500, 700)]


def test_what_is_sustained_is_the_second_half_of_each_way_s_time() -> None:
    called = Counter[str]()

    def layer(**operands: Any) -> torch.Tensor:
        called["ours"] += 1
        return GOLDEN.call(**operands)

    found = sustained([TINY], [replace(GOLDEN, name="automatic", call=layer)], CPU, reported, seconds=0.0)
    assert [(each.measure, each.path) for each in found] == [
        *((measure, path) for measure in ("base forward", "base dX") for path in ("composite", "automatic"))
    ]
    assert {(each.megahertz, each.watts) for each in found} == {(1500, 700)}
    assert all(each.seconds > 0 for each in found)
    assert called["ours"] == 3 * 10 + 1  # dX goes forward once, and then backward alone


def test_a_gpu_reports_clock_and_power_through_its_driver_s_command(
    tmp_path: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, said = tmp_path / "nvidia-smi", tmp_path / "said"
    tool.write_text(
        '#!/bin/sh\n[ "$1" = --id=GPU-12-ab ] && printf "1980, 699.5\\n1500, [N/A]\\n15"\n'
        f"touch {said}\nexec sleep 60\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="12-ab"))
    with readings(CPU)() as seen:
        while not said.exists():
            time.sleep(0.01)
    assert seen == [Reading(1980, 699.5)]
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError), readings(CPU)():
        pass


@pytest.fixture
def packages(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    write_humming(tmp_path)
    write_unsloth(tmp_path)
    yield from on_path(tmp_path, monkeypatch)


@pytest.mark.usefixtures("packages")
def test_packed_products_of_others_get_our_bytes_and_are_timed() -> None:
    found, absent = peers()
    products = [path for path in found if path.package in ("humming-kernels", "unsloth_zoo")]
    rows = time_shape(TINY, products, CPU, FakeClock(), EFFORT, PRODUCTS)
    assert [(row.measure, row.path, row.status) for row in rows] == [
        ("base forward", "composite", "ok"),
        ("base forward", "unsloth, MXFP4", "ok"),
        ("base forward", "humming, MXFP4", "ok"),
        ("base dX", "composite", "ok"),
        ("base dX", "unsloth, MXFP4", "ok"),
    ]
    assert about_peers([*products, GOLDEN]) == {
        "unsloth, MXFP4": "unsloth_zoo 2026.10.9, its packed MXFP4 product",
        "humming, MXFP4": "humming-kernels 0.1.19, its packed MXFP4 product, forward only",
    }
    assert not {"humming", "unsloth"} & set(absent)


def test_a_peer_that_cannot_be_timed_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "humming", None)
    found, absent = peers()
    assert found == []
    assert absent["humming"].startswith("not timed, No module named 'humming")
