"""Failures by likely cause, led by the finding that names it best."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from mxref.verification.checks.finding import Finding, Status
from mxref.verification.checks.registry import BASELINE, STATE, why
from mxref.verification.report.output import tensor_order

_LAST = ("drift", "exponent", "sign", "interval")
"""Checks of ordinary numbers name a bug less plainly than exact ones; of these, the best first."""
_SEVERAL = 3
"""Items whose problems have something in common that is more than chance."""
_OUTSIDE = (STATE.name, BASELINE.name)
"""No checks of a case."""


@dataclass(frozen=True)
class Cause:
    """Failures that look alike.

    Attributes:
        naming: the most telling one, on the smallest problem.
        others: all others.
    """

    naming: Finding
    others: tuple[Finding, ...]

    @property
    def cases(self) -> list[str]:
        """The others' cases, each once."""
        return [case for case in dict.fromkeys(finding.case for finding in self.others) if case != self.naming.case]

    @property
    def common(self) -> dict[str, str | int | float]:
        """What several failed items' problems have in common but the seed; empty for a single item."""
        problems = {finding.id: finding.problem for finding in (self.naming, *self.others) if finding.problem}
        if len(problems) < _SEVERAL:
            return {}
        entries = [set(problem.items()) for problem in problems.values()]
        shared = set.intersection(*entries)
        return {
            name: value for name, value in self.naming.problem.items() if (name, value) in shared and name != "seed"
        }


def causes(findings: Sequence[Finding], checks: Iterable[str] | None = None) -> list[Cause]:
    """The failures grouped: those of one item, and of items whose most telling failures differ only in numbers.

    `checks`: names of the checks asked, in order; by default a layer's.
    """
    names = [name for name in (why() if checks is None else checks) if name not in (*_LAST, *_OUTSIDE)]
    rank = partial(_rank, {name: place for place, name in enumerate((*names, *_LAST))})
    items: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        if finding.status is Status.FAIL:
            items.setdefault((finding.id, "" if finding.id else finding.case), []).append(finding)
    groups: dict[str, list[Finding]] = {}
    for failed in items.values():
        groups.setdefault(_said(min(failed, key=rank)), []).extend(failed)
    found = []
    for group in groups.values():
        naming, *others = sorted(group, key=rank)
        found.append(Cause(naming, tuple(others)))
    return sorted(found, key=lambda cause: (rank(cause.naming)[:3], -len(cause.others)))


def _said(finding: Finding) -> str:
    """A failure's cause without numbers: its power of two, else where it is, else why."""
    ratio = re.search(r"2\^[-−]?\d+", " ".join((*finding.patterns, finding.reason)))
    if ratio is not None:
        return f"{finding.tensor}: {ratio[0].replace('-', '−')}"
    return _without_numbers(f"{finding.tensor}: {(*finding.patterns, finding.reason)[0]}")


def _without_numbers(text: str) -> str:
    return re.sub(r"[\d.,−]+", "#", text)


def _rank(places: Mapping[str, int], finding: Finding) -> tuple[bool, bool, bool, int, tuple[int, str], int, int]:
    """Sort key: ended runs, exact checks, patterns; first tensor, smallest problem."""
    place = places.get(finding.check, -1)
    somewhere = any(pattern != "every element" and "2^" not in pattern for pattern in finding.patterns)
    first, ordinary = tensor_order(finding.tensor), finding.check in _LAST
    return finding.tensor != "all", ordinary, not somewhere, place, first, -len(finding.patterns), finding.elements
