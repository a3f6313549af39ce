"""What a mutant's own process does: build `mxref.kernels` from the edited sources, ask the checks, say what they find."""

from __future__ import annotations

import faulthandler
import importlib.util
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

import mxref
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.own.interpret_only import interpret_only
from mxref.verification.candidates.own_code import OwnCode
from mxref.verification.candidates.shipped import shipped
from mxref.verification.gate.plan import Item, slopes_in
from mxref.verification.gate.run import judge
from mxref.verification.studies.mutation.coverage import functions_run
from mxref.verification.studies.mutation.mutant import Mutant
from mxref.verification.studies.mutation.questions import IMPORT, is_open
from mxref.verification.studies.mutation.sources import Place, Source

_ADDRESS_SPACE = 24 << 30
"""Bytes a mutant may map on a CPU, so that a wrong size cannot take the machine down."""


@dataclass(frozen=True)
class Task:
    """What one process judges.

    Attributes:
        mutant: which; None for the sources as they are.
        sources: the kernels', by file name.
        items: the questions, in this order.
        device: what they were made for.
        gpu: the one to see, as CUDA_VISIBLE_DEVICES names it; None for what is visible anyway.
        every: see `is_open`.
        traced: note which functions run.
    """

    mutant: Mutant | None
    sources: Mapping[str, Source]
    items: Sequence[Item]
    device: torch.device
    gpu: str | None
    every: bool
    traced: bool


@dataclass(frozen=True)
class Said:
    """A child's message: item `number` begins, None before the first; or what came of it.

    Attributes:
        number: the item.
        rejections: which checks reject the mutant, and why.
        seconds: of processor time that the item took; None as it begins.
        functions: of the unmutated sources, which the item ran.
    """

    number: int | None
    rejections: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None
    functions: frozenset[Place] | None = None


def run_child(send: Callable[[Said], None], task: Task, folder: Path) -> None:
    """Build in `folder`, judge, report.

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
        send(Said(None, {IMPORT: traceback.format_exc(limit=1).strip().splitlines()[-1]}))
        return
    slopes, code, kills = slopes_in(task.items), OwnCode.now(), set[str]()
    for number, item in enumerate(task.items):
        if is_open(item, kills, task.every):
            send(Said(number))
            begun = time.process_time()
            with functions_run(folder) if task.traced else nullcontext() as functions:
                rejections = _rejections(item, candidate, slopes, code)
            if rejections or task.mutant is None:
                ran = None if functions is None else frozenset(functions)
                send(Said(number, rejections, time.process_time() - begun, ran))
                kills.update(rejections)


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


def _rejections(item: Item, candidate: Candidate, slopes: int, code: OwnCode) -> dict[str, str]:
    """Check -> why it rejects the candidate; whatever is raised outside the checks counts for the first of them."""
    assert candidate.accumulation is not None
    try:
        findings = judge(item, candidate, candidate.accumulation, slopes, code=code)
    except Exception as error:
        return {item.checks[0].name: f"{item.name}: {type(error).__name__}: {error}"[:300]}
    failed = [finding for finding in findings if not finding.ok]
    return {finding.check: f"{finding}"[:300] for finding in reversed(failed)}
