"""What a mutant's own process does: build `mxref.kernels` from the edited sources, ask the checks, say what they find."""

from __future__ import annotations

import faulthandler
import importlib.util
import os
import resource
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter

import mxref
from mxref.verification.candidates.candidate import Candidate, shipped
from mxref.verification.studies.mutation.layers import Question, Trial
from mxref.verification.studies.mutation.mutant import Mutant
from mxref.verification.studies.mutation.sources import Source

__all__ = ["IMPORT", "Said", "Task", "import_kernels", "run_child", "write_sources"]

_ADDRESS_SPACE = 24 << 30
"""Bytes a mutant may map on a CPU, so that a wrong size cannot take the machine down."""

IMPORT = -1
"""In the place of a question's number: the import of the edited sources."""


@dataclass(frozen=True)
class Task:
    """What one process judges.

    Attributes:
        mutant: which; None for the sources as they are.
        sources: the kernels', by file name.
        questions: what to ask, in this order.
        device: what the questions were made for.
        gpu: the one to see, as CUDA_VISIBLE_DEVICES names it; None for what is visible anyway.
        matrix: ask every check; otherwise the first rejection ends it.
    """

    mutant: Mutant | None
    sources: Mapping[str, Source]
    questions: Sequence[Question]
    device: torch.device
    gpu: str | None
    matrix: bool


@dataclass(frozen=True)
class Said:
    """A child's message: question `number` begins, or with a reason, it rejects the mutant."""

    number: int
    reason: str | None = None


def run_child(send: Callable[[Said], None], task: Task, folder: Path) -> None:
    """Build in `folder`, judge, report. A check that has rejected the mutant is asked nothing more.

    Raises:
        MemoryError, OSError: the import failed for want of memory or disk space, which tells nothing of the mutant.
    """
    _quiet()
    if task.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = task.gpu
    try:
        write_sources(task.mutant, task.sources, folder)
        import_kernels(folder)
        candidate = shipped(task.device)
    except (MemoryError, OSError):
        raise
    except Exception:
        send(Said(IMPORT, traceback.format_exc(limit=1).strip().splitlines()[-1]))
        return
    killed = set[str]()
    for number, question in enumerate(task.questions):
        if question.check in killed:
            continue
        send(Said(number))
        reason = _reject(question.trial, candidate)
        if reason is not None:
            send(Said(number, reason))
            killed.add(question.check)
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
        text = mutant.apply(source.text) if mutant is not None and mutant.place.file == name else source.text
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


def _reject(trial: Trial, candidate: Candidate) -> str | None:
    """Why the trial rejects the candidate, or None."""
    try:
        findings = trial.judge(candidate)
    except Exception as error:
        return f"{trial.name}: {type(error).__name__}: {error}"[:300]
    return next((f"{finding}"[:300] for finding in findings if not finding.ok), None)
