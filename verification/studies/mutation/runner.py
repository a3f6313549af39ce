"""Runs mutants: one forked process each (see `child`).

The parent imports everything else and draws every sample once; a child costs a fork, an import of the kernel modules,
and its trials. Whatever a mutant does to its process, a crash or a loop without end, the parent only sees that it died.
"""

from __future__ import annotations

import importlib
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch

from mxref.verification.studies.mutation.child import Task, run_child
from mxref.verification.studies.mutation.layers import Layer
from mxref.verification.studies.mutation.mutant import Mutant, Source

__all__ = ["Outcome", "run"]

_PATIENCE = 3
"""A child may be silent for so many times a trial's processor time by the clock; then it waits for something, or
spins where no signal reaches it, in an allocator whose memory it has overwritten.
"""

_LENIENCE = 20
"""Times a mutant's limit that the unmutated sources are given: nobody compiled for them before."""


@dataclass(eq=False)
class Outcome:
    """What became of one mutant; None stands for the sources as they are.

    Attributes:
        mutant: which.
        kills: layer -> why it rejected the mutant, for each layer that did.
        judged: layers that ran, in the order in which they did last.
        seconds: wall-clock time.
    """

    mutant: Mutant | None
    kills: dict[str, str] = field(default_factory=dict)
    judged: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def killed(self) -> bool:
        """Whether any layer rejected it."""
        return bool(self.kills)


@dataclass
class _Job:
    outcome: Outcome
    task: Task
    folder: Path
    process: ForkProcess
    messages: Connection
    started: float
    heard: float
    done: bool = False

    @property
    def left(self) -> list[Layer]:
        """What a child that died while it asked every layer has not come to: all layers that did not kill."""
        kills = self.outcome.kills
        died = self.process.exitcode and "import" not in kills
        return [layer for layer in self.task.layers if layer.name not in kills] if died else []


def run(
    mutants: Sequence[Mutant | None],
    sources: Mapping[str, Source],
    layers: Sequence[Layer],
    *,
    device: torch.device,
    matrix: bool = False,
    apart: bool = False,
    jobs: int = 1,
    trial_seconds: float = 20.0,
    until: float = math.inf,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Judge mutants.

    Args:
        mutants: what to judge; None for the unmutated sources.
        sources: the kernels' sources that the mutants belong to.
        layers: what judges them.
        device: what the layers were made for.
        matrix: ask every layer about every mutant; otherwise stop at the first that rejects it.
        apart: the unmutated sources' trials are shared among `jobs` processes.
        jobs: processes at once.
        trial_seconds: a mutant's trial that takes more processor time counts as hung.
        until: the time, by the monotonic clock, from which on no further mutant is begun.
        on_outcome: called as each mutant is done.

    Returns:
        One outcome a mutant that was begun; of the unmutated sources, if `apart`, one a process.
    """
    if device.type == "cpu":
        _import_what_children_need()
    context, gpus = get_context("fork"), _gpus() if device.type == "cuda" else []
    whole = _in_rounds(layers)
    shares = [whole[job::jobs] for job in range(min(jobs, len(whole)))] if apart else [whole]
    pending = [(Outcome(mutant), part) for mutant in mutants for part in ([whole] if mutant is not None else shares)]
    pending.reverse()
    running, outcomes = list[_Job](), list[Outcome]()
    with tempfile.TemporaryDirectory(prefix="mxref-mutants-") as root:
        try:
            while pending or running:
                if time.monotonic() > until:
                    pending = [(outcome, part) for outcome, part in pending if outcome in outcomes]
                while pending and len(running) < jobs:
                    outcome, part = pending.pop()
                    if outcome not in outcomes:
                        outcomes.append(outcome)
                    folder = Path(tempfile.mkdtemp(dir=root))
                    receiver, sender = context.Pipe(duplex=False)
                    gpu = gpus[len(outcomes) % len(gpus)] if gpus else None
                    limit = trial_seconds * (_LENIENCE if apart and outcome.mutant is None else 1)
                    task = Task(outcome.mutant, sources, part, device, gpu, limit, matrix)
                    process = context.Process(target=run_child, args=(task, folder, sender))
                    process.start()
                    sender.close()
                    now = time.monotonic()
                    running.append(_Job(outcome, task, folder, process, receiver, now, now))
                wait([job.messages for job in running], timeout=0.5)
                for job in running:
                    _listen(job)
                for job in [job for job in running if job.done]:
                    running.remove(job)
                    job.outcome.seconds += time.monotonic() - job.started
                    if matrix and job.left:
                        pending.append((job.outcome, job.left))
                    else:
                        on_outcome(job.outcome)
        finally:
            for job in running:
                job.process.kill()
                job.process.join()
    return outcomes


def _gpus() -> list[str]:
    """The GPUs that children share, as CUDA_VISIBLE_DEVICES names them; counted without touching one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


def _import_what_children_need() -> None:
    """Modules that torch imports when autograd and deterministic algorithms are first used; a second for every child.

    On a CPU only: a parent whose imports might look at a GPU must not have them.
    """
    for name in ("torch.fx.experimental.symbolic_shapes", "torch._inductor"):
        importlib.import_module(name)


def _in_rounds(layers: Sequence[Layer]) -> list[Layer]:
    """The first trial of every layer, then the second of every layer, and so on, the slow layers last."""
    single = {layer.name: [Layer(layer.name, (trial,)) for trial in layer.trials] for layer in layers}
    rounds = zip_longest(*(single[layer.name] for layer in layers if not layer.slow))
    quick = [layer for each in rounds for layer in each if layer is not None]
    return quick + [trial for layer in layers if layer.slow for trial in single[layer.name]]


def _listen(job: _Job) -> None:
    """Take what a child said; notice its death; end it when it is far over time."""
    outcome = job.outcome
    try:
        while job.messages.poll():
            layer, reason = job.messages.recv()
            job.heard = time.monotonic()
            if reason is not None:
                outcome.kills[layer] = reason
            else:
                outcome.judged = [*(name for name in outcome.judged if name != layer), layer]
    except EOFError:
        job.process.join()
        job.done = True
    if not job.done and time.monotonic() - job.heard > _PATIENCE * job.task.trial_seconds:
        job.process.kill()
        job.process.join()
        job.done = True
    if job.done:
        code = job.process.exitcode
        if code and outcome.judged[-1:]:
            outcome.kills.setdefault(outcome.judged[-1], f"crashed: {_died(code)}")
        elif code:
            outcome.kills.setdefault("import", f"crashed: {_died(code)}")
        job.messages.close()
        shutil.rmtree(job.folder, ignore_errors=True)


def _died(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"
