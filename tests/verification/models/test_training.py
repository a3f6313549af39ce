"""Steps that are timed, batches that do not fit, and what one side's process says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mxref.kernels.models.sizes import TINY, Batch
from mxref.verification.models import side
from mxref.verification.models.build import empty_model, needs
from mxref.verification.models.profile import ELSE, KINDS, Shares
from mxref.verification.models.run import ModelRun, run_model
from mxref.verification.models.side import Stored, Task, store, train
from mxref.verification.models.training import Steps, is_out_of_memory, time_steps

CPU = torch.device("cpu")
ONE = replace(TINY, layers=1)
BATCH = Batch(1, 8)
ABOUT = Steps("dense", "eager", "", 1)


class Tried(nn.Module):
    """A model of one parameter whose loss is given, or raised."""

    def __init__(self, loss: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.config: Any = type("Config", (), {"vocab_size": 5})
        self.loss, self.seen = loss, list[Tensor]()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        self.seen.append(input_ids)
        assert torch.equal(input_ids, labels)
        return type("Out", (), {"loss": self.loss(self.weight.sum())})


def test_a_batch_is_read_from_a_text() -> None:
    assert Batch.read("4x1024") == Batch(4, 1024)
    assert (Batch(4, 1024).size, str(Batch(4, 1024).doubled())) == (4096, "8 × 1024")
    for text in ("4", "4x", "0x8", "4x-1", "4X8", "4x8x2"):
        with pytest.raises(ValueError, match="expected sequences x tokens"):
            Batch.read(text)


def test_the_first_step_and_the_median_of_the_measured_ones() -> None:
    model = Tried(lambda total: total)
    row = time_steps(model, BATCH, 3, CPU, ABOUT)
    assert [tuple(ids.shape) for ids in model.seen] == [(1, 8)] * 5
    assert row.ok
    assert row.batch == "1 × 8"
    assert row.trainable == 3
    assert row.tokens_per_second == pytest.approx(8 / row.median)
    assert 0 < row.host <= row.median
    assert model.weight.grad is None
    assert float(model.weight.detach().sum()) < 3  # it has trained


def test_an_error_of_memory_is_an_answer_and_another_is_not() -> None:
    def full(total: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def wrong(total: Tensor) -> Tensor:
        raise RuntimeError("shapes differ")

    assert time_steps(Tried(full), BATCH, 1, CPU, ABOUT).status == "out of memory"
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        time_steps(Tried(wrong), BATCH, 1, CPU, ABOUT)


def test_a_loss_that_is_not_finite_is_a_failure() -> None:
    row = time_steps(Tried(lambda total: total * float("nan")), BATCH, 1, CPU, ABOUT)
    assert (row.status, row.ok, row.median) == ("failed: the last loss is nan", False, 0.0)


def said(work: Callable[..., None], task: Task) -> list[Any]:
    found: list[Any] = []
    work(found.append, task)
    return found


def task(**changes: Any) -> Task:
    return replace(Task(ONE, "dense", (BATCH,), device="cpu", count=1, rank=4), **changes)


@pytest.fixture(autouse=True)
def cache_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A side's process chooses its own caches of compiled kernels; here the tests' process stands in for it."""
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "")


def test_both_sides_train_the_same_adapters() -> None:
    rows = [said(train, task(side=name))[0] for name in ("packed", "dense")]
    assert [(row.side, row.status, row.layers, row.fresh) for row in rows] == [
        ("packed", "ok", 1, True),
        ("dense", "ok", 1, True),
    ]
    assert rows[0].trainable == rows[1].trainable == 4 * (4 * (64 + 128) + 4 * (64 + 64) + (64 + 64) + (64 + 32))
    for row in rows:
        assert row.loss == pytest.approx(torch.tensor(256.0).log().item(), abs=0.5)


def test_only_the_first_batch_of_a_process_is_its_first_start() -> None:
    rows = said(train, task(batches=(BATCH, Batch(2, 8))))
    assert [(row.batch, row.fresh) for row in rows] == [("1 × 8", True), ("2 × 8", False)]


def test_the_largest_batch_is_found_by_doubling(monkeypatch: pytest.MonkeyPatch) -> None:
    def until_four(model: Any, batch: Batch, count: int, device: torch.device, about: Steps) -> Steps:
        return replace(about, batch=str(batch), status="ok" if batch.sequences <= 4 else "out of memory")

    monkeypatch.setattr(side, "time_steps", until_four)
    rows = said(train, task(largest=True))
    assert [(row.batch, row.status) for row in rows] == [
        *((f"{n} × 8", "ok") for n in (1, 2, 4)),
        ("8 × 8", "out of memory"),
    ]


def test_a_model_that_is_larger_than_the_device() -> None:
    (row,) = said(train, task(room=1000))
    assert row.status.startswith("does not fit: 0.0 GiB of weights, adapters and AdamW's moments; there are 0.0")


def test_as_many_layers_as_fit_and_fewer_where_training_needs_more(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = replace(TINY, layers=4, as_many_layers=True)
    needed = needs(empty_model(endless.config()), endless, 4, packed=False)
    room = needed.fixed + sum(needed.layers[:3])
    seen: list[int] = []

    def until_two(model: Any, batch: Batch, count: int, device: torch.device, about: Steps) -> Steps:
        seen.append(about.layers)
        return (
            time_steps(model, batch, count, device, about)
            if about.layers <= 2
            else replace(about, status="out of memory")
        )

    monkeypatch.setattr(side, "time_steps", until_two)
    (row,) = said(train, task(model=endless, room=room))
    assert seen == [3, 2]
    assert (row.status, row.layers, row.fresh) == ("ok", 2, False)


def test_the_largest_batch_is_that_of_the_layers_that_fit_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = replace(TINY, layers=3, as_many_layers=True)

    def while_small(model: Any, batch: Batch, count: int, device: torch.device, about: Steps) -> Steps:
        fits = about.layers * batch.sequences <= 4
        return replace(about, batch=str(batch), status="ok" if fits else "out of memory")

    monkeypatch.setattr(side, "time_steps", while_small)
    rows = said(train, task(model=endless, batches=(BATCH, Batch(2, 8)), largest=True, room=2**40))
    assert [(row.batch, row.layers, row.status) for row in rows] == [
        ("1 × 8", 3, "ok"),
        ("2 × 8", 2, "ok"),
        ("4 × 8", 2, "out of memory"),
    ]


def test_so_many_layers_and_no_fewer() -> None:
    endless = replace(TINY, layers=4, as_many_layers=True)
    needed = needs(empty_model(endless.config()), endless, 4, packed=False)
    (row,) = said(train, task(model=endless.shortened(2), room=needed.fixed + needed.layers[0]))
    assert row.status.startswith("does not fit: ")
    (row,) = said(train, task(model=endless.shortened(2)))
    assert (row.status, row.layers) == ("ok", 2)
    assert endless.shortened(9).layers == 4


def test_what_transformers_refuses_is_told() -> None:
    (row,) = said(train, task(attention="sdpa"))
    assert row.status.startswith("failed: ValueError: GptOssForCausalLM does not support an attention implementation")


def test_a_checkpoint_is_written_read_and_trained(tmp_path: Path) -> None:
    stored = task(side="packed", folder=str(tmp_path))
    (written,) = said(store, stored)
    loaded, row = said(train, stored)
    assert [type(found) for found in (written, loaded, row)] == [Stored, Stored, Steps]
    assert [found.what for found in (written, loaded)] == ["written", "loaded"]
    assert written.octets == loaded.octets == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) > 0
    assert (row.side, row.status, row.layers) == ("packed, from disk", "ok", 1)


def test_a_checkpoint_that_could_not_be_written_is_not_read(tmp_path: Path) -> None:
    """Another one may lie there, of a run before."""
    said(store, task(side="packed", folder=str(tmp_path)))
    run, lacking = ModelRun("tiny", "", 1, 4, "CPU"), replace(ONE, config_class="NoSuchConfig")
    run_model(run, [task(model=lacking, side="packed", folder=str(tmp_path))], 100, lambda _: None)
    assert [row.side for row in run.steps] == ["packed, from disk"]
    assert "has no NoSuchConfig" in run.steps[0].status
    assert not run.stored
    assert not run.missing  # it has come to its end
    assert run.exit_code == 1


def test_what_an_interruption_leaves_out_is_named() -> None:
    run = ModelRun("tiny", "", 1, 4, "CPU")

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_model(run, [task(), task(side="packed")], 100, interrupt)
    assert [row.status for row in run.steps] == ["ok"]
    assert run.missing == ["dense, eager", "packed, eager"]


def test_a_profile_of_each_batch_that_was_asked_for() -> None:
    found = said(train, task(profile=True))
    assert [type(each) for each in found] == [Steps, Shares]
    seconds = found[1].seconds
    assert list(seconds) == ["total", *(kind.name for kind in KINDS), ELSE]
    assert seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"])
    assert seconds["our products"] == 0
    for name in ("others' products of the experts", "self-attention", "elementwise of the block", "optimiser", ELSE):
        assert seconds[name] > 0, name


def test_a_profile_that_fails_takes_nothing_from_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Shares:
        raise ValueError("CUPTI says no")

    monkeypatch.setattr(side, "profiled", broken)
    steps, told = said(train, task(profile=True))
    assert steps.ok
    assert (told.batch, told.status) == ("1 × 8", "no profile: failed: ValueError: CUPTI says no")


def test_a_process_that_ends_badly_is_a_row() -> None:
    run = ModelRun("tiny", "", 1, 4, "CPU")
    news: list[str] = []
    run_model(run, [task(model="no model at all")], 100, news.append)
    (row,) = run.steps
    assert row.status.startswith("failed: ")
    assert run.exit_code == 1
    assert news
