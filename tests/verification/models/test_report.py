"""What is kept and shown of a whole model: a record, Markdown, the README."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mxref.kernels.models.sizes import MODELS
from mxref.verification.cli import main
from mxref.verification.cli.own import bench_models
from mxref.verification.models.block import Block
from mxref.verification.models.build import empty_model, needs
from mxref.verification.models.profile import ELSE, Shares
from mxref.verification.models.report import as_page, figures
from mxref.verification.models.run import ModelRun
from mxref.verification.models.side import Stored, Task
from mxref.verification.models.training import Steps
from mxref.verification.records.readme import blocks
from mxref.verification.records.record import KINDS, read, write

GIB = 2**30


def seen(model: str = "gpt-oss-20b") -> ModelRun:
    """A run with a row of each kind."""
    run = ModelRun(model, "config.json", 24, 16, "NVIDIA H100", started="2026-12-01T10:00:00Z")
    numbers: Any = {"first": 9.5, "fresh": True, "spread": 0.01, "host": 0.2, "trainable": 177, "loss": 12.25}
    run.take(Steps("packed", "eager", "4 × 1024", 24, median=0.5, tokens_per_second=8192, peak=20 * GIB, **numbers))
    run.take(Steps("dense", "eager", "4 × 1024", 24, median=1.0, tokens_per_second=4096, peak=50 * GIB, **numbers))
    run.take(Steps("packed", "eager", "8 × 1024", 20, "out of memory"))
    run.take(Steps("dense", "sdpa", "", 0, "does not fit: 99 GiB"))
    run.take(Shares("packed", "eager", "4 × 1024", {"total": 0.4, "our products": 0.1, ELSE: 0.3}))
    run.take(Block("4 × 1024", 16384, 0.004, "graph", 0.002, 8e14, 3e12))
    run.take(Stored("written", 12.0, 13 * GIB, 2 * GIB, 13 * GIB))
    return run


def test_a_table_of_steps_and_sentences_on_the_rest() -> None:
    text = "\n".join(figures(seen().as_json()))
    assert "| packed | 4 × 1024 | 500 ± 1.0% | 0.50 | 8,192 | 200 | 20.0 |  | 9.5 (cold) | 12.25 |" in text
    assert "| dense | 4 × 1024 | 1,000 ± 1.0% |  | 4,096 | 200 | 50.0 |" in text
    assert "| packed, 20 of 24 layers | 8 × 1024 | out of memory |" in text
    assert "| dense, sdpa | – | does not fit |" in text
    assert "dense, sdpa: does not fit: 99 GiB." in text
    assert "| packed, eager, 4 × 1024 | 400.0 | 100.0 | 300.0 |" in text
    assert "MoE block, 16,384 routed rows, forward and backward with recomputation: 4.00 ms (graph), 2.00 times" in text
    assert "Checkpoint of 13.0 GiB written in 12.0 s, peak memory 2.0 GiB on the host, 13.0 GiB on the device." in text
    assert "Trained parameters: 177." in text


def test_the_largest_batch_is_told_where_it_was_sought() -> None:
    run = seen()
    assert "The largest batch" in "\n".join(figures(run.as_json()))
    run.steps.pop(2)
    assert "The largest batch" not in "\n".join(figures(run.as_json()))


def test_a_packed_step_is_compared_with_as_many_dense_layers_only() -> None:
    run = seen()
    run.steps[1] = Steps("dense", "eager", "4 × 1024", 12, median=1.0)
    assert "500 ± 1.0% |  | 8,192" in "\n".join(figures(run.as_json()))


def test_what_failed_makes_the_command_fail_and_what_does_not_fit_does_not() -> None:
    run = seen()
    assert run.exit_code == 0
    run.take(Steps("dense", "eager", "", 0, "failed: ValueError: no"))
    assert run.exit_code == 1
    assert ModelRun("tiny", "", 1, 1, "").exit_code == 1


def test_an_attention_that_runs_with_no_experts_is_nobody_s_failure_here() -> None:
    run = seen()
    run.take(Steps("packed", "sdpa", "", 0, "failed: ValueError: not supported"))
    assert run.exit_code == 1
    run.take(Steps("dense", "sdpa", "", 0, "failed: ValueError: not supported"))
    assert run.exit_code == 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100")


@pytest.mark.usefixtures("gpu")
def test_the_record_its_page_and_the_readme(tmp_path: Path) -> None:
    assert "No whole model has been recorded yet." in blocks(tmp_path)["models"]
    path = write("gpt-oss-20b", seen().as_json(), torch.device("cuda"), tmp_path, page=as_page)
    page = path.with_suffix(".md").read_text()
    assert page == as_page(read(path))
    text = blocks(tmp_path)["models"]
    assert "**gpt-oss-20b**, random weights; 2026-12-01, NVIDIA H100, torch " in text
    assert "| packed | 4 × 1024 | 500 ± 1.0% | 0.50 |" in text
    assert "evidence/nvidia-h100/gpt-oss-20b.md" in text
    assert f"[{KINDS['gpt-oss-20b'].about}]" in blocks(tmp_path)["records"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt-oss-21b"], "--model gpt-oss-21b is unknown; choose from gpt-oss-20b, "),
        (
            ["--model", "tiny", "--device", "cpu", "--batch", "4"],
            "--batch '4' is no batch; expected sequences x tokens",
        ),
        (["--model", "tiny", "--device", "cpu", "--record"], "--record keeps what a GPU saw"),
        (["--model", "gpt-oss-20b"], "no CUDA GPU"),
        (["--profile"], "--profile is for whole models: give --model NAME too"),
        (["--device", "cpu"], "--device is for whole models: give --model NAME too"),
        (["--steps", "3"], "--steps is for whole models: give --model NAME too"),
        (["--model", "tiny", "--rows"], "--rows is for a layer: leave --model out"),
        (["--model", "tiny", "--no-peers"], "--no-peers is for a layer: leave --model out"),
    ],
)
def test_wrong_use(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench_models, "_found_wrong", lambda *_: pytest.fail("the gate takes long, and comes later"))
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "free", "message"),
    [
        (["--model", "gpt-oss-120b"], 60 * GIB, "a checkpoint of gpt-oss-120b takes 60.8 GiB, and there are 60.0"),
        (["--model", "deepseek-v4-flash"], 999 * GIB, "no card holds deepseek-v4-flash: give --layers too"),
        (["--model", "deepseek-v4-flash", "--layers", "9"], 10 * GIB, "a checkpoint of deepseek-v4-flash takes 3"),
    ],
)
def test_a_checkpoint_has_to_fit(
    arguments: list[str], free: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(bench_models, "_found_wrong", lambda *_: pytest.fail("the gate takes long, and comes later"))
    monkeypatch.setattr(bench_models.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    assert main(["bench", "--device", "cpu", "--from-disk", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_was_found_before_an_interruption_is_shown_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mxref.verification.models import run as running

    def interrupted(found: ModelRun, tasks: list[Task], seconds: float, on_news: Callable[[str], None]) -> None:
        found.missing = ["dense, eager"]
        found.take(Steps("packed", "eager", "1 × 8", 2, median=0.5))
        raise KeyboardInterrupt

    kept: list[dict[str, Any]] = []
    monkeypatch.setattr(bench_models, "_found_wrong", lambda *_: [])
    monkeypatch.setattr(bench_models, "keep", lambda _, seen, *__, **___: kept.append(seen) or {})
    monkeypatch.setattr(running, "run_model", interrupted)
    assert main(["bench", "--model", "tiny", "--device", "cpu", "--out", str(tmp_path)]) == 130
    assert [len(seen["steps"]) for seen in kept] == [1]
    assert "Interrupted: dense, eager was not seen to its end." in capsys.readouterr().out


def test_ranks_of_adapters_with_which_a_card_of_80_gb_has_room_to_train() -> None:
    model = MODELS["gpt-oss-120b"]
    empty, card = empty_model(model.config()), 78 * GIB
    assert needs(empty, model, model.rank, packed=True).total < card - 8 * GIB
    assert needs(empty, model, 2 * model.rank, packed=True).total > card - 2 * GIB


def test_the_command_trains_and_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In processes of their own, as users run it; the gate is judged elsewhere."""
    monkeypatch.setattr(bench_models, "_found_wrong", lambda *_: [])
    words = "bench --model tiny --device cpu --side dense --batch 1x8 --steps 1 --rank 2 --out"
    assert main([*words.split(), str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "mxref: tiny: dense, eager, 1 × 8: " in said.err
    assert "tiny on CPU" in said.out
    assert (tmp_path / "tiny.json").is_file()


def test_nothing_is_timed_on_a_red_gate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_models, "_found_wrong", lambda *_: ["integer: wrong"])
    assert main(["bench", "--model", "tiny", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "The gate is red: nothing was timed." in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
