"""What a mutant's own process does: build `mxref.kernels` from the edited sources, ask the layers, report."""

from __future__ import annotations

import faulthandler
import importlib.util
import os
import resource
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter

import mxref
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.shipped import shipped
from mxref.verification.studies.mutation.layers import Layer, Trial
from mxref.verification.studies.mutation.mutant import Mutant, Source

__all__ = ["Task", "import_kernels", "run_child", "write_sources"]

_ADDRESS_SPACE = 24 << 30
"""Bytes a mutant may map on a CPU, so that a wrong size cannot take the machine down."""


@dataclass(frozen=True)
class Task:
    """What one process judges.

    Attributes:
        mutant: which; None for the sources as they are.
        sources: the kernels', by file name.
        layers: what to ask, in this order.
        device: what the layers were made for.
        gpu: the one to see, as CUDA_VISIBLE_DEVICES names it; None for what is visible anyway.
        trial_seconds: processor time after which a trial counts as hung.
        matrix: ask every layer; otherwise the first rejection ends it.
    """

    mutant: Mutant | None
    sources: Mapping[str, Source]
    layers: Sequence[Layer]
    device: torch.device
    gpu: str | None
    trial_seconds: float
    matrix: bool


def run_child(task: Task, folder: Path, messages: Connection) -> None:
    """Build in `folder`, judge, report: (layer, None) when a layer starts, (layer, reason) when it rejects the mutant.

    The first rejection ends it; in a matrix it ends the questions to that layer.
    """
    _quiet()
    if task.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = task.gpu
    try:
        write_sources(task.mutant, task.sources, folder)
        import_kernels(folder)
        candidate = shipped(task.device)
    except Exception:
        messages.send(("import", traceback.format_exc(limit=1).strip().splitlines()[-1]))
        return
    killed = set[str]()
    for layer in task.layers:
        if layer.name in killed:
            continue
        messages.send((layer.name, None))
        trials = (_reject(trial, candidate, task.trial_seconds) for trial in layer.trials)
        if (reason := next(filter(None, trials), None)) is not None:
            messages.send((layer.name, reason))
            killed.add(layer.name)
            if not task.matrix:
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
        _interpret_only()


def _interpret_only() -> None:
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
        (folder / name).parent.mkdir(exist_ok=True)
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
