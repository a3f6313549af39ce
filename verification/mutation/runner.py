"""Runs mutants: one forked process each, in which `mxref.kernels` is built from the edited sources and judged.

The parent imports everything else and draws every sample once; a child costs a fork, an import of the kernel modules,
and its trials. Whatever a mutant does to its process, a crash or a loop without end, the parent only sees that it died.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter

import mxref
from mxref.verification.candidates import Candidate, shipped
from mxref.verification.mutation.layers import Layer, Trial
from mxref.verification.mutation.mutant import Mutant, Source

__all__ = ["Outcome", "import_kernels", "run", "write_sources"]

_PATIENCE = 3
"""A child may be silent for so many times a trial's processor time by the clock; then it waits for something, or
spins where no signal reaches it, in an allocator whose memory it has overwritten.
"""

_LENIENCE = 20
"""Times a mutant's limit that the unmutated sources are given: nobody compiled for them before."""

_ADDRESS_SPACE = 24 << 30
"""Bytes a mutant may map on a CPU, so that a wrong size cannot take the machine down."""


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
    layers: Sequence[Layer]
    folder: Path
    process: ForkProcess
    messages: Connection
    limit: float
    started: float
    heard: float
    done: bool = False

    @property
    def left(self) -> list[Layer]:
        """What a child that died while it asked every layer has not come to: all layers that did not kill."""
        kills = self.outcome.kills
        died = self.process.exitcode and "import" not in kills
        return [layer for layer in self.layers if layer.name not in kills] if died else []


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
                    arguments = (outcome.mutant, sources, part, device, gpu, folder, limit, matrix, sender)
                    process = context.Process(target=_child, args=arguments)
                    process.start()
                    sender.close()
                    now = time.monotonic()
                    running.append(_Job(outcome, part, folder, process, receiver, limit, now, now))
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
    if not job.done and time.monotonic() - job.heard > _PATIENCE * job.limit:
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


def _child(
    mutant: Mutant | None,
    sources: Mapping[str, Source],
    layers: Sequence[Layer],
    device: torch.device,
    gpu: str | None,
    folder: Path,
    trial_seconds: float,
    matrix: bool,
    messages: Connection,
) -> None:
    """Build, judge, report: (layer, None) when a layer starts, (layer, reason) when it rejects the mutant.

    The first rejection ends it; with `matrix` it ends the questions to that layer.
    """
    _quiet()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        write_sources(mutant, sources, folder)
        import_kernels(folder)
        candidate = shipped(device)
    except Exception:
        messages.send(("import", traceback.format_exc(limit=1).strip().splitlines()[-1]))
        return
    killed = set[str]()
    for layer in layers:
        if layer.name in killed:
            continue
        messages.send((layer.name, None))
        reason = next((reason for trial in layer.trials if (reason := _reject(trial, candidate, trial_seconds))), None)
        if reason is not None:
            messages.send((layer.name, reason))
            killed.add(layer.name)
            if not matrix:
                return


def _quiet() -> None:
    """No output, no core file, bounded memory, one thread: many children share the machine."""
    faulthandler.disable()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, resource.getrlimit(resource.RLIMIT_AS)[1]))
        interpret_only()


def interpret_only() -> None:
    """Prepare this process for nothing but Triton's interpreter, in half the time.

    The interpreter replaces all of Triton's language at every launch and every call of a jit function, to put it back
    after a launch, and builds its table of dtypes at every operation: once is enough where nothing compiles. It also
    computes every 32-bit operation a second time in 64 bits, to report an overflow; a GPU wraps around, and so does it.
    """
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: SimpleNamespace(restore=lambda: None)
    numpy_dtype, known = interpreter._get_np_dtype, dict[str, Any]()

    def remembered(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = numpy_dtype(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = remembered


def write_sources(mutant: Mutant | None, sources: Mapping[str, Source], folder: Path) -> None:
    """The kernels' sources with the mutant's edit, as files: Triton reads a function's source from its file."""
    for name, source in sources.items():
        edited = mutant is not None and mutant.file == name
        text = mutant.apply(source.text) if mutant is not None and edited else source.text
        (folder / name).write_text(text, encoding="utf-8")


def import_kernels(folder: Path) -> None:
    """Import the sources in `folder` as `mxref.kernels`, in place of what has that name now."""
    for name in [name for name in sys.modules if name == "mxref.kernels" or name.startswith("mxref.kernels.")]:
        del sys.modules[name]
    spec = importlib.util.spec_from_file_location(
        "mxref.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)
    sys.modules["mxref.kernels"] = kernels
    spec.loader.exec_module(kernels)
    mxref.kernels = kernels


def _reject(trial: Trial, candidate: Candidate, seconds: float) -> str | None:
    """Why the trial rejects the candidate, or None."""
    try:
        with _time_limit(seconds):
            findings = trial.judge(candidate)
    except Exception as error:
        return f"{trial.name}: {type(error).__name__}: {error}"[:300]
    return next((f"{finding}"[:300] for finding in findings if not finding.ok), None)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread after so much processor time: a busy machine makes nothing look hung.

    Python cannot interrupt who spins in a library, waiting for a GPU: a little later the system ends the process.
    """

    def expired(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"hung: no result in {seconds:.0f} s of processor time")

    signal.signal(signal.SIGPROF, expired)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_VIRTUAL, 1.2 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
