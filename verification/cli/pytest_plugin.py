"""The gate as a pytest plugin: `pytest --mxref-kernel my.module:layer` adds one test a check and case.

The candidate is judged once, in a process of its own, for all selected tests; with pytest-xdist by every worker: leave
out -n.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mxref.verification.cases.scope import Suite
    from mxref.verification.gate.order import Order
    from mxref.verification.gate.process import ItemInfo
    from mxref.verification.gate.result import GateResult

_CHOICES = {
    "kernel": "judge module:callable or path/to/file.py:callable, one test a check and case",
    "device": "cpu or cuda (default: cuda where there is a GPU)",
    "covers": "the part of the domain that it supports, for instance 'forward, gates=none'",
    "case": "only cases, or checks, that match",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("mxref", "judge a kernel against the golden model of mxref")
    for name, text in _CHOICES.items():
        group.addoption(f"--mxref-{name}", metavar=name.upper(), help=text)
    group.addoption("--mxref-full", action="store_true", help="the suite for a release")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the judgements."""
    if config.getoption("--mxref-kernel"):
        items.extend(Judgements.from_parent(session, name="mxref").collect())


class Judgements(pytest.Collector):
    """What the candidate is asked and, from the first test on, the result."""

    _result: GateResult | None = None

    def collect(self) -> Iterable[pytest.Item]:
        """One test a check and case."""
        from mxref.verification.gate.isolated import list_items
        from mxref.verification.gate.process import Refused

        try:
            entries = list_items(self._order())
        except (Refused, ValueError) as error:
            raise pytest.UsageError(f"--mxref-kernel: {error}") from None
        for entry in entries:
            for check in entry.checks:
                yield Judgement.from_parent(self, name=f"{check}[{entry.case}]", entry=entry, check=check)

    def result(self) -> GateResult:
        """The one run for all selected tests."""
        from mxref.verification.gate.isolated import judge_apart

        if self._result is None:
            chosen = {item.entry.id: None for item in self.session.items if isinstance(item, Judgement)}
            self._result = judge_apart(self._order(tuple(chosen)), suite="pytest")
        return self._result

    def _order(self, rerun: tuple[str, ...] = ()) -> Order:
        from mxref.verification.cli.options import choose_device
        from mxref.verification.gate.order import Order

        option = self.config.getoption
        device, pattern = choose_device(option("--mxref-device")).type, option("--mxref-case")
        suite: Suite = "full" if option("--mxref-full") else "quick"
        patterns = (pattern,) if pattern else ()
        return Order(
            option("--mxref-kernel"), device, suite, covers=option("--mxref-covers"), patterns=patterns, rerun=rerun
        )


class Judgement(pytest.Item):
    """One check on one case."""

    def __init__(self, *, entry: ItemInfo, check: str, **options: Any) -> None:
        super().__init__(**options)
        self.entry, self.check = entry, check

    def runtest(self) -> None:
        """Fail with findings that contradict the contract, or with what was declined."""
        assert isinstance(self.parent, Judgements)
        result = self.parent.result()
        mine = [finding for finding in result.findings if finding.id == self.entry.id]
        own = [finding for finding in mine if finding.check == self.check or finding.check not in self.entry.checks]
        told = own or [finding for finding in mine if not finding.ok]
        wrong = [finding for finding in told if not finding.ok or finding in result.declined]
        if wrong:
            again = f"again: {result.command} --rerun {self.entry.id}"
            pytest.fail("\n".join([*map(str, wrong), *filter(None, [wrong[0].trace, again])]), pytrace=False)
        if not told:
            if result.faults or result.left_out:
                pytest.fail("; ".join(filter(None, [*result.faults, result.left_out])), pytrace=False)
            pytest.skip("nothing to judge: the candidate does not offer it")

    def reportinfo(self) -> tuple[str, int | None, str]:
        """Where a reader finds it."""
        return "mxref", None, self.name
