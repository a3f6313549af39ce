"""A model on several ranks: what each has is put together, what fails is a row, and the command shows a table."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_questions import Raises

from mxref.kernels.models.sizes import TINY, Batch
from mxref.verification.cli import main
from mxref.verification.cli.own import bench_models, bench_parallel
from mxref.verification.models import together
from mxref.verification.models.profile import ELSE, KINDS
from mxref.verification.models.together import Row, Together, table, trained

BATCH = Batch(1, 8)


@pytest.mark.parametrize(
    ("said", "status"),
    [("CUDA out of memory. Tried", "out of memory"), ("shapes differ", "failed: RuntimeError: shapes differ")],
)
def test_what_one_rank_raises_is_a_row(said: str, status: str) -> None:
    row = trained(Raises(said), 2, "cpu", 30)  # type: ignore[arg-type]
    assert (row.status, row.ranks, row.median) == (status, 2, 0.0)


@pytest.mark.parametrize("way", ["fsdp", "experts"])
def test_ranks_share_a_model(way: Any) -> None:
    """Each trains tokens of its own, and holds a part of the experts; rows travel where experts are divided."""
    row = trained(Together(TINY, "packed", way, 1, BATCH, 1, 2), 2, "cpu", 120)
    assert (row.status, row.ranks, row.layers) == ("ok", 2, 1)
    assert row.tokens_per_second == pytest.approx(2 * BATCH.size / row.median)
    assert 0 < row.gathers < row.total
    assert (row.all_to_all > 0) == (way == "experts")


def test_the_table_compares_with_one_rank_and_tells_what_did_not_fit() -> None:
    alone = Row("packed", "one rank", 1, "1 × 8", 2, median=1.0, tokens_per_second=8.0)
    both = replace(alone, way="fsdp", ranks=2, tokens_per_second=12.0, all_to_all=0.25, products=0.5)
    full = Row("dense", "fsdp", 2, "1 × 8", 2, "out of memory")
    head, _, *lines = table([asdict(row) for row in (alone, both, full)])
    assert {line.count("|") for line in lines} == {head.count("|")}
    assert "| 12 | 1.50 |" in lines[1]
    assert "| 250.0 | 0.0 | 500.0 |" in lines[1]
    assert "out of memory" in lines[2]


def test_kinds_of_exchange() -> None:
    """By the names that NCCL's kernels have; nothing of ours is taken for one."""
    first, second = together._ALL_TO_ALL, together._OTHER_EXCHANGE
    assert first.holds("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "experts")
    for kernel in ("ncclDevKernel_AllGather_RING_LL(x)", "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(x)"):
        assert second.holds(kernel, "")
        assert not first.holds(kernel, "")
    for kernel in ("grouped_matmul_kernel", "void at::native::reduce_kernel<512>", "nvjet_tst_128x64", "spread_kernel"):
        assert not first.holds(kernel, "experts")
        assert not second.holds(kernel, "experts")
    assert set(together._PRODUCTS) <= {kind.name for kind in KINDS} - {ELSE}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way beside one rank; dense experts are sharded, never divided."""
    monkeypatch.setattr(bench_models, "_found_wrong", lambda *_: [])
    asked = list[tuple[str, str, int, int]]()

    def answer(question: Together, ranks: int, device: str, seconds: float) -> Row:
        asked.append((question.side, question.way, ranks, question.layers))
        status = "failed: so" if question.way == "experts" else "ok"
        return Row(question.side, question.way, ranks, "1 × 8", question.layers, status, tokens_per_second=1.0)

    monkeypatch.setattr(together, "trained", answer)
    command = ["bench", "--model", "tiny", "--device", "cpu", "--batch", "1x8", "--out", str(tmp_path), "--layers", "1"]
    assert main([*command, "--parallel", "fsdp"]) == 0
    assert main([*command, "--parallel", "experts", "--world", "3"]) == 1
    one = [("packed", "one rank", 1, 1), ("dense", "one rank", 1, 1)]
    assert asked[:4] == [*one, ("packed", "fsdp", 2, 1), ("dense", "fsdp", 2, 1)]
    assert asked[4:] == [*one, ("packed", "experts", 3, 1), ("dense", "fsdp", 3, 1)]
    assert "mxref: tiny: packed, experts, 1 × 8: failed: so" in capsys.readouterr().err
    kept = json.loads((tmp_path / "tiny-parallel.json").read_text())
    assert not kept["passed"]
    assert len(kept["rows"]) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--world", "2"], "--world is for several ranks"),
        (["--parallel", "fsdp", "--profile"], "are for one process"),
        (["--parallel", "fsdp", "--batch", "8"], "'8' is no batch"),
    ],
)
def test_wrong_use(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_models, "_found_wrong", lambda *_: pytest.fail("the gate takes long, and comes later"))
    assert main(["bench", "--model", "tiny", "--device", "cpu", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_each_rank_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    arguments = bench_models.argparse.Namespace(
        parallel=["fsdp"], world=None, layers=None, attention=None, largest_batch=False, profile=False, from_disk=None,
        record=None, side="both",
    )  # fmt: skip
    with pytest.raises(bench_parallel.UsageError, match="torch sees 1 CUDA GPUs"):
        bench_parallel.check(arguments, torch.device("cuda"))
