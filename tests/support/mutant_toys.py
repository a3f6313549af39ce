"""Questions about mutants that tests make up, and the shipped sources that mutants are of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from mxref.verification.cases.own.tables import TableCase, TableSample
from mxref.verification.checks.check import Asked, Check
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.gate.plan import Item
from mxref.verification.studies.mutation.catalogue import catalogue
from mxref.verification.studies.mutation.mutant import Mutant
from mxref.verification.studies.mutation.runner import Outcome, Setting, run
from mxref.verification.studies.mutation.sources import read_sources

SOURCES = read_sources()
CPU = torch.device("cpu")


@cache
def everything() -> list[Mutant]:
    return catalogue(SOURCES)


def a_finding(ok: bool) -> Finding:
    return Finding("", "case", "Y", Status.PASS if ok else Status.FAIL, "a reason", 1, int(not ok))


def passes(candidate: object) -> list[Finding]:
    return [a_finding(True)]


def fails(candidate: object) -> list[Finding]:
    return [a_finding(False)]


def toy(name: str, way: Callable[[object], list[Finding]]) -> Item:
    """A question whose check finds what `way` returns."""
    ask: Any = lambda candidate, _: way(candidate)  # noqa: E731
    compare: Any = lambda found, _: list(found)  # noqa: E731
    check = Check(name, "A toy.", Asked.OWN, lambda *_: [], ask, compare)
    case = TableCase("toy", 0, ())
    return Item((check,), case, lambda: TableSample(case, CPU))


def named(name: str) -> Mutant:
    return next(mutant for mutant in everything() if mutant.name == name)


def setting(**changes: Any) -> Setting:
    return replace(Setting(SOURCES, CPU), **changes)


def ask_toys(toys: Sequence[Item], mutants: Sequence[Mutant | None] = (None,), **changes: Any) -> list[Outcome]:
    return run(mutants, toys, setting(**changes))
