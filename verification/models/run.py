"""Every side of the models that were asked for, one process after the other, and what came of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from mxref.verification.bench.pairs import digits
from mxref.verification.candidates.processes import Ended, Job, Limits, Pool
from mxref.verification.models.block import Block
from mxref.verification.models.profile import Shares
from mxref.verification.models.side import Stored, Task, judge, store, train
from mxref.verification.models.training import Steps

__all__ = ["ModelRun", "run_gate_apart", "run_model"]

_PACKAGES = ("transformers", "peft", "accelerate", "safetensors")


@dataclass
class ModelRun:
    """What was seen of one model.

    Attributes:
        model: its name.
        source: of its sizes.
        of_layers: that the whole model has.
        rank: of the adapters.
        device: in words.
        steps, shares, blocks, stored: in the order in which they came.
        missing: sides that were asked for and have not come to their end.
        started: UTC, ISO 8601.
        packages: versions of what takes part besides torch and triton.
    """

    model: str
    source: str
    of_layers: int
    rank: int
    device: str
    steps: list[Steps] = field(default_factory=list)
    shares: list[Shares] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    stored: list[Stored] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    started: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
    packages: dict[str, str] = field(default_factory=lambda: {name: metadata.version(name) for name in _PACKAGES})

    @property
    def exit_code(self) -> int:
        """0 unless something failed; that a model or a batch does not fit is an answer.

        So is an attention that transformers does not run with dense experts either.
        """
        failed = [row for row in self.steps if row.status.startswith("failed")]
        others = {row.attention for row in failed if row.side == "dense"} - {"eager"}
        return int(not self.steps or any(row.attention not in others for row in failed))

    def as_json(self) -> dict[str, Any]:
        """Everything that was seen, as plain data; the fields of rows are those of their classes."""
        return {
            "passed": self.exit_code == 0,
            "started": self.started,
            "model": self.model,
            "source": self.source,
            "of_layers": self.of_layers,
            "rank": self.rank,
            "device": self.device,
            "packages": self.packages,
            "missing": self.missing,
            "steps": [_plain(row) for row in self.steps],
            "shares": [_plain(row, **row.seconds) for row in self.shares],
            "blocks": [_plain(row) for row in self.blocks],
            "stored": [_plain(row) for row in self.stored],
        }

    def take(self, found: Steps | Shares | Block | Stored) -> None:
        """Add what a process has sent."""
        kinds: dict[type, list[Any]] = {
            Steps: self.steps, Shares: self.shares, Block: self.blocks, Stored: self.stored,
        }  # fmt: skip
        kinds[type(found)].append(found)


def _plain(row: Any, **more: float) -> dict[str, Any]:
    """A row as a flat object, its numbers rounded."""
    every = {name: value for name, value in (asdict(row) | more).items() if not isinstance(value, dict)}
    return {name: digits(value) if isinstance(value, float) else value for name, value in every.items()}


def run_gate_apart(device: str, seconds: float) -> list[str]:
    """What the gate finds wrong with the kernels, from a process that leaves nothing on the device."""
    found: list[str] = ["the gate's process said nothing"]
    for _, message in _messages([Job("gate", judge, (device,))], seconds):
        if isinstance(message, list):
            found = message
        elif isinstance(message, Ended) and not message.well:
            found = [f"the gate's process {message}"]
    return found


def run_model(run: ModelRun, tasks: Sequence[Task], seconds: float, on_news: Callable[[str], None]) -> None:
    """Carry out tasks into `run`.

    Args:
        run: what is found goes there as it comes.
        tasks: one process each, one after the other; before a task with a folder another one writes the checkpoint.
        seconds: that a process may stay silent, waiting or computing.
        on_news: told what was found, in words.
    """
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # a card that is nearly full
    run.missing = [f"{task.name}, {task.attention}" for task in tasks]
    for task in tasks:
        for work in (store, train) if task.folder else (train,):
            if not _carried_out(run, Job(task, work, (task,)), seconds, on_news):
                break  # a checkpoint that could not be written is not read: what lies there may be another one
        del run.missing[0]


def _carried_out(run: ModelRun, job: Job[Task], seconds: float, on_news: Callable[[str], None]) -> bool:
    """Take what a process finds into `run`; whether all of it went well."""
    well = True
    for _, message in _messages([job], seconds):
        if isinstance(message, Ended):
            if message.well:
                continue
            message = job.about.row(0, f"failed: {message}")
        run.take(message)
        on_news(str(message))
        well &= not isinstance(message, Steps) or message.ok
    return well


def _messages(jobs: Iterable[Job[Any]], seconds: float) -> Iterator[tuple[Job[Any], Any]]:
    with Pool[Any](1, "spawn") as pool:
        for job in jobs:
            job.limits = Limits(processor=2 * seconds, silence=seconds)  # of several threads
            pool.waiting.append(job)
        yield from pool
