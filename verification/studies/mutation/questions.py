"""What mutants are asked: the gate's own checks in its order, on small cases; and which bits their results have."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256

import torch

from mxref.verification.arithmetic.tensor_bytes import bytes_of
from mxref.verification.candidates.answer import Answer
from mxref.verification.candidates.asking import once
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.sequences import in_sequences
from mxref.verification.cases.case import Case
from mxref.verification.cases.draw import draw
from mxref.verification.cases.own.tables import TableCase
from mxref.verification.cases.scope import Scope
from mxref.verification.checks.check import Asked, Check
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.checks.registry import CHECKS, STATE
from mxref.verification.gate.plan import Item, plan

IMPORT, BITS = "import", "bits"
"""Names beside those of the gate's checks: the import of the edited sources, and `bits`."""

FOREIGN = frozenset({IMPORT, *(check.name for check in (*CHECKS, STATE) if check.asked is Asked.ANY)})
"""What kills a kernel from elsewhere too."""


def questions(device: torch.device, seed: int = 0) -> list[Item]:
    """The gate's plan for this project's kernels on small cases.

    All samples are drawn here, on the CPU, for every process that is forked from this one; each moves them to its
    device, since a process that has touched a GPU cannot hand it to its forks.
    """
    return [_drawn(_unshrunk(item), device, seed) for item in plan(Scope("small", device.type, seed), own=True)]


def is_open(item: Item, kills: Collection[str], every: bool) -> bool:
    """Whether there is something left to ask of a mutant that these checks have rejected.

    Args:
        item: the question.
        kills: names of checks.
        every: ask every check; otherwise ask until one has rejected it that a kernel from elsewhere is asked too.
    """
    checks = {check.name for check in item.checks}.difference(kills)
    if every or not kills:
        return bool(checks)
    return FOREIGN.isdisjoint(kills) and not FOREIGN.isdisjoint(checks)


def bits(items: Sequence[Item]) -> Item:
    """A question that nobody passes: its reason holds a SHA-256 of what a mutant computes for all samples."""
    fixtures = [item for item in items if item.checks[0].ask is once]

    def ask(candidate: Candidate, sample: object) -> list[Answer]:
        return [answer for item in fixtures for answer in once(candidate, item.sample)]

    check = Check(BITS, "Equivalent mutants have the sources' bits.", Asked.OWN, lambda scope: [], ask, _digest)
    case = TableCase("all samples", 0, ())
    return Item((check,), case, lambda: case.sample(torch.device("cpu"), 0))


def _digest(answers: Sequence[Answer], expected: object) -> list[Finding]:
    told = sha256()
    for answer in answers:
        told.update(repr(answer.error).encode())
        for name, tensor in answer.outputs.items():
            told.update(name.encode())
            if tensor is not None:
                told.update(bytes_of(tensor.cpu()).numpy().tobytes())
    return [Finding("", "all samples", "all", Status.FAIL, told.hexdigest(), 0, 0)]


def _unshrunk(item: Item) -> Item:
    """Whether a sequence goes wrong is all that is asked."""
    if item.checks[0].ask is not in_sequences:
        return item
    return replace(item, checks=tuple(replace(check, ask=partial(in_sequences, shrink=False)) for check in item.checks))


def _drawn(item: Item, device: torch.device, seed: int) -> Item:
    if not isinstance(item.case, Case):
        return item
    return replace(item, draw=partial(draw(item.case, seed=seed).to, device))
