"""What is kept and shown of a benchmark: evidence, Markdown, a terminal, the README."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import pytest
import torch
from races import (
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

from mxref.verification.bench import racing, report
from mxref.verification.bench.benchmark import run_benchmark
from mxref.verification.bench.paths import DEQUANTISED, Path
from mxref.verification.bench.racing import Row
from mxref.verification.bench.workloads import MEASURES
from mxref.verification.cli.options import EVIDENCE
from mxref.verification.records import evidence


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
