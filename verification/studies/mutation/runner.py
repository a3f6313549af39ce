"""Runs mutants: one forked process each (see `child`).

The parent imports everything else and draws every sample once; a child costs a fork, an import of the kernel modules,
and its questions. A mutant that crashes its process, or spends a question's processor time, is killed. A child that dies
while it imports, or waits, or is ended by somebody else, says nothing: the machine may be to blame. Its mutant is asked
again with nothing beside it, and that it waits then counts only if the unmutated sources hardly do.
"""

from __future__ import annotations

import importlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch

from mxref.verification.candidates.processes import Ended, Job, Limits, Pool
from mxref.verification.gate.plan import Item
from mxref.verification.studies.mutation.child import Said, Task, run_child
from mxref.verification.studies.mutation.coverage import Coverage, that_may_notice
from mxref.verification.studies.mutation.mutant import Mutant
from mxref.verification.studies.mutation.questions import IMPORT, is_open
from mxref.verification.studies.mutation.sources import Place, Source

_IMPORTING = Limits(processor=300.0, silence=1200.0)
"""What a child may take before its first question."""

_PATIENCE = 10
"""By the clock a question may take so many times what it may take of processor time."""

_HARDLY = 0.1
"""The part of that which the unmutated sources may need at most, for waiting to be the mutant's fault."""

_LENIENCE = 60
"""Times a mutant's least limit that the unmutated sources are given: nobody knows yet what they take."""
_SLOWER = 5
"""A mutant may take so many times the processor time that the unmutated sources take for the same item."""


@dataclass(eq=False)
class Outcome:
    """What became of one mutant; None stands for the sources as they are.

    Attributes:
        mutant: which.
        kills: check -> why it rejected the mutant, for each that did; "import" for the import.
        judged: checks that ran, in the order in which they did last.
        unjudged: check -> why it gave no answer, for each that was asked in vain.
        seconds: wall-clock time.
        coverage: of the sources as they are, where the interpreter runs them.
        usual: an item's id -> the processor time that the sources as they are took for it, in seconds.
    """

    mutant: Mutant | None
    kills: dict[str, str] = field(default_factory=dict)
    judged: list[str] = field(default_factory=list)
    unjudged: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    coverage: dict[str, frozenset[Place]] = field(default_factory=dict)
    usual: dict[str, float] = field(default_factory=dict)

    @property
    def killed(self) -> bool:
        """Whether any check rejected it."""
        return bool(self.kills)


@dataclass(frozen=True)
class Setting:
    """How mutants are judged.

    Attributes:
        sources: the kernels' sources that the mutants belong to.
        device: what the questions were made for.
        matrix: ask every check about each mutant by hand, not only until one is enough; see `is_open`.
        jobs: processes at once.
        trial_seconds: processor time that every question about a mutant may take before it counts as hung.
        usual: an item's id -> the processor time that the unmutated sources take; a slow machine's is long.
        traced: note which functions the unmutated sources' items run, in the interpreter; it doubles their time.
    """

    sources: Mapping[str, Source]
    device: torch.device
    matrix: bool = False
    jobs: int = 1
    trial_seconds: float = 20.0
    usual: Mapping[str, float] = field(default_factory=dict)
    traced: bool = False

    def limits(self, item: Item, lenience: int = 1) -> Limits:
        """Of one question."""
        processor = max(lenience * self.trial_seconds, _SLOWER * self.usual.get(item.id, 0.0))
        return Limits(processor, _PATIENCE * processor)

    def asks_all(self, mutant: Mutant | None) -> bool:
        """Whether every check is asked, also when one has rejected the mutant; None for the sources as they are."""
        return mutant is None or (self.matrix and mutant.by_hand)


def run(
    mutants: Sequence[Mutant | None],
    items: Sequence[Item],
    setting: Setting,
    *,
    apart: bool = False,
    coverage: Coverage = MappingProxyType({}),
    until: float = math.inf,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Judge mutants.

    Args:
        mutants: what to judge; None for the unmutated sources.
        items: the questions, in this order.
        setting: how.
        apart: the unmutated sources' items are shared among processes, and given more time.
        coverage: of the items, as far as it is known: what cannot notice a mutant is not asked about it, but for what
            is asked everything; see `Setting.matrix`.
        until: the time, by the monotonic clock, from which on no further mutant is begun.
        on_outcome: called as each mutant is done.

    Returns:
        One outcome a mutant that was begun; of the unmutated sources, if `apart`, one a process.
    """
    if setting.device.type == "cpu":
        _import_what_children_need()
    parts = min(setting.jobs, len(items)) if apart else 1
    shares = [items[part::parts] for part in range(parts)]
    lenience = _LENIENCE if apart else 1
    with tempfile.TemporaryDirectory(prefix="mxref-mutants-") as root, Pool[_Part](setting.jobs, "fork") as pool:
        judge = _Judge(setting, Path(root), on_outcome)
        for mutant in mutants:
            if mutant is None:
                pool.waiting.extend(judge.job(Outcome(None), share, lenience) for share in shares)
                continue
            every = setting.asks_all(mutant)
            asked = items if every else that_may_notice(items, mutant, setting.sources, coverage)
            pool.waiting.append(judge.job(Outcome(mutant), asked))
        outcomes = [job.about.outcome for job in pool.waiting]
        if time.monotonic() > until:
            pool.waiting.clear()
            return []
        for job, said in pool:
            if time.monotonic() > until:
                unbegun = [job for job in pool.waiting if not job.about.outcome.judged]
                for late in unbegun:
                    pool.waiting.remove(late)
                    outcomes.remove(late.about.outcome)
            pool.waiting.extend(judge.hear(job, said))
        judge.ask_again()
    return outcomes


@dataclass(eq=False)
class _Part:
    """One child's part: whom it asks what, how patiently, where it builds its sources, and which item it is at."""

    outcome: Outcome
    items: Sequence[Item]
    lenience: int
    folder: Path
    at: int | None = None

    @property
    def checks(self) -> list[str]:
        """Whose item it is at."""
        return [IMPORT] if self.at is None else [check.name for check in self.items[self.at].checks]


class _Judge:
    """Keeps the outcomes while their children speak, and whom to ask again."""

    def __init__(self, setting: Setting, root: Path, on_outcome: Callable[[Outcome], None]) -> None:
        self._setting, self._root, self._on_outcome = setting, root, on_outcome
        self._gpus = _gpus() if setting.device.type == "cuda" else []
        self._again: list[_Part] = []
        self._jobs = 0

    def job(self, outcome: Outcome, items: Sequence[Item], lenience: int = 1) -> Job[_Part]:
        """A child's work."""
        part = _Part(outcome, items, lenience, self._root / str(self._jobs))
        gpu = self._gpus[self._jobs % len(self._gpus)] if self._gpus else None
        self._jobs += 1
        sources, device = self._setting.sources, self._setting.device
        traced = self._setting.traced and outcome.mutant is None and device.type == "cpu"
        task = Task(outcome.mutant, sources, items, device, gpu, self._setting.asks_all(outcome.mutant), traced)
        return Job(part, run_child, (task, part.folder), _IMPORTING)

    def hear(self, job: Job[_Part], said: Said | Ended, alone: bool = False) -> list[Job[_Part]]:
        """Take note of what a child said, or how it ended; what is left to ask then."""
        part, outcome = job.about, job.about.outcome
        if isinstance(said, Said):
            part.at, job.limits = said.number, self._limits(part, said)
            outcome.kills |= said.rejections
            if said.number is not None and said.seconds is not None:
                outcome.usual[part.items[said.number].id] = said.seconds
                if said.functions is not None:
                    outcome.coverage[part.items[said.number].id] = said.functions
            if not said.rejections and part.at is not None:
                outcome.judged = [*(check for check in outcome.judged if check not in part.checks), *part.checks]
            return []
        outcome.seconds += time.monotonic() - job.started
        shutil.rmtree(part.folder, ignore_errors=True)
        tells_nothing = not said.well and (said.from_outside or part.at is None)
        if tells_nothing and not alone:
            self._again.append(part)
            return []
        if tells_nothing and not self._hangs(part, said):
            outcome.unjudged |= dict.fromkeys(part.checks, f"{said}")
        elif not said.well:
            outcome.kills = dict.fromkeys(part.checks, f"{said}") | outcome.kills
        left = [] if said.well or part.at is None else part.items[part.at + 1 :]
        left = [item for item in left if is_open(item, outcome.kills, self._setting.asks_all(outcome.mutant))]
        if left:
            return [self.job(outcome, left, part.lenience)]
        self._on_outcome(outcome)
        return []

    def ask_again(self) -> None:
        """Ask alone, one by one, what nobody answered."""
        for part in self._again:
            with Pool[_Part](1, "fork") as pool:
                pool.waiting.append(self.job(part.outcome, part.items[part.at or 0 :], part.lenience))
                for job, said in pool:
                    pool.waiting.extend(self.hear(job, said, alone=True))

    def _limits(self, part: _Part, said: Said) -> Limits:
        """From now on."""
        return _IMPORTING if said.number is None else self._setting.limits(part.items[said.number], part.lenience)

    def _hangs(self, part: _Part, ended: Ended) -> bool:
        """Whether a mutant that waited in vain, alone, has itself to blame."""
        if ended.over != "silence" or part.at is None:
            return False
        return self.control(part) < _HARDLY * self._setting.limits(part.items[part.at], part.lenience).silence

    def control(self, part: _Part) -> float:
        """Seconds by the clock that the unmutated sources need alone for a part's item; inf without an answer."""
        assert part.at is not None
        begun = -math.inf
        with Pool[_Part](1, "fork") as pool:
            pool.waiting.append(self.job(Outcome(None), [part.items[part.at]], part.lenience))
            for job, said in pool:
                if isinstance(said, Said):
                    job.limits = self._limits(job.about, said)
                    if said.rejections:
                        return math.inf
                    begun = time.monotonic() if said.seconds is None else begun
                elif not said.well:
                    return math.inf
        return time.monotonic() - begun


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
