"""What is kept and shown of a benchmark: evidence, Markdown, a terminal, the README."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import pytest
import torch
from benchmarks import (
    CPU,
    DECODER,
    GOLDEN,
    TINY,
    FakeClock,
    fixed_ceilings,
    green,
    out_of_memory,
    timed,
)
from rich.console import Console

from mxref.verification.bench import report
from mxref.verification.bench.benchmark import Bench, run_benchmark
from mxref.verification.bench.pairs import Row
from mxref.verification.bench.paths import DEQUANTISED, Path
from mxref.verification.bench.samples import keep_samples
from mxref.verification.bench.workloads import MEASURES
from mxref.verification.cli import main
from mxref.verification.cli.own import bench as cli_bench
from mxref.verification.cli.own.history import load_history
from mxref.verification.records.readme import blocks
from mxref.verification.records.record import read, write


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")


def kept(root: File, bench: Bench) -> dict[str, Any]:
    """The benchmark as a record that was written and read again."""
    return read(write("bench", report.as_json(bench), torch.device("cuda"), root, page=report.as_markdown))


@pytest.mark.usefixtures("gpu")
class TestReport:
    def test_the_page_is_made_from_the_record(self, tmp_path: File) -> None:
        entry = kept(tmp_path, timed(GOLDEN, Path("large", "", out_of_memory)))
        page = (tmp_path / "nvidia-h200" / "bench.md").read_text()
        assert page == report.as_markdown(entry)
        assert "| tiny | golden | " in page
        assert "| tiny | large | out of memory |" in page

    def test_the_readme_s_part_is_made_from_the_record(self, tmp_path: File) -> None:
        bench = timed(GOLDEN)
        entry = kept(tmp_path, bench)
        text = blocks(tmp_path)["bench"]
        for said in (bench.started[:10], "NVIDIA H200", f"torch {entry['versions']['torch']}", "| tiny | ", "1.00 ("):
            assert said in text

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

    def recorded(self, root: File, *ways: Path, first_call: float | None = None, shape: str = "tiny") -> dict[str, Any]:
        bench = run_benchmark(green(), [replace(TINY, name=shape)], ways, CPU, FakeClock(), fixed_ceilings)
        bench.first_call = first_call
        return kept(root, bench)


@pytest.mark.usefixtures("gpu")
class TestCommand:
    """`mxref bench` with a benchmark that was timed before."""

    def run(self, bench: Bench, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
        monkeypatch.setattr(cli_bench, "choose_device", lambda wanted, require_gpu: torch.device("cuda"))
        monkeypatch.setattr(cli_bench, "_measure", lambda arguments, shapes, device: bench)
        return main(["bench", *arguments])

    def test_keeps_what_was_asked_for(self, tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
        bench, root = timed(GOLDEN), tmp_path / "evidence"
        places = ["--out", str(tmp_path), "--samples", str(tmp_path / "samples"), "--record", str(root)]
        assert self.run(bench, monkeypatch, *places) == 0
        assert json.loads((tmp_path / "bench.json").read_text()) == report.as_json(bench)
        stamp = bench.started.replace(":", "")
        written = {str(path.relative_to(root)) for path in root.rglob("*.*")}
        assert written == {f"nvidia-h200/{name}" for name in ("bench.json", "bench.md", f"history/{stamp}.json")}
        assert [entry.commit for entry in load_history(root)["nvidia-h200"]] == ["abc"]
        assert (tmp_path / "samples" / "nvidia-h200" / "0001_abc.json").is_file()

    def test_what_failed_is_no_evidence(self, tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
        bench = green()
        bench.rows = [Row("tiny", "step", "ours", "composite", True, 3.0, "disagrees")]
        assert self.run(bench, monkeypatch, "--out", str(tmp_path), "--record", str(tmp_path / "evidence")) == 1
        assert (tmp_path / "bench.json").is_file()
        assert not (tmp_path / "evidence").exists()


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


def test_pytest_benchmark_compares_our_runs(tmp_path: File) -> None:
    for _ in range(2):
        keep_samples(timed(GOLDEN), tmp_path, "nvidia-h200")
    first, second = sorted((tmp_path / "nvidia-h200").iterdir())
    assert (first.name, second.name) == ("0001_abc.json", "0002_abc.json")
    compare = ["--storage", f"file://{tmp_path}", "compare", "nvidia-h200/0001", "nvidia-h200/0002"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", *compare], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("'tiny, base': 4 tests") == 1
    assert done.stdout.count("golden (0001_abc)") == len(MEASURES) - 1
