"""Shared test set-up: where kernels run, and what a missing GPU means."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Kernels run on the GPU where there is one, else in Triton's interpreter, which must be chosen before they are defined.
# With MXREF_RANKS=nccl only the ranks of tests/support/world.py are on GPUs.
if not torch.cuda.is_available() or os.environ.get("MXREF_RANKS") == "nccl":
    os.environ.setdefault("TRITON_INTERPRET", "1")

from mxref.kernels.device.launch import INTERPRETED
from mxref.verification.candidates.own.interpret_only import interpret_only
from mxref.verification.clone import EVIDENCE
from mxref.verification.records.record import write

if INTERPRETED:
    interpret_only(report_overflow=True)
pytest_plugins = ["pytester"]
# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("mxref", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mxref")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="fail, instead of skipping, when no CUDA GPU is there")
    parser.addoption(
        "--record-evidence",
        metavar="DIR",
        nargs="?",
        type=Path,
        const=EVIDENCE,
        help="with -m gpu: keep every outcome as evidence of this GPU (default: verification/evidence)",
    )


def pytest_configure(config: pytest.Config) -> None:
    pytest.register_assert_rewrite("legal_calls")
    if config.getoption("--require-gpu") and not torch.cuda.is_available():
        raise pytest.UsageError("--require-gpu: torch sees no CUDA GPU on this machine")
    folder = config.getoption("--record-evidence")
    if folder is None or hasattr(config, "workerinput"):
        return
    narrowed = config.option.keyword or config.args_source is pytest.Config.ArgsSource.ARGS
    if config.option.markexpr != "gpu" or narrowed or not torch.cuda.is_available():
        raise pytest.UsageError(
            "--record-evidence keeps the whole of `pytest -m gpu` on a GPU; leave out what narrows it"
        )
    config.pluginmanager.register(_Outcomes(folder))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark, before -m selects, what runs on the GPU where there is one: every test that asks for the `device`.

    What takes minutes there begins first: where tests run beside each other, nobody waits for one that came last.
    """
    present = torch.cuda.is_available()
    for item in items:
        if present and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
        if not present and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    items.sort(key=lambda item: present and item.get_closest_marker("minutes") is None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Where ranks will run, their server is started first: with less imported, everyone's imports would be theirs."""
    if "world" in sys.modules and not session.config.option.collectonly:
        sys.modules["world"].serve()


class _Outcomes:
    """Writes what each test came to."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._tests = folder, dict[str, str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._tests[report.nodeid] = report.outcome

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        counts = Counter(self._tests.values())
        passed = exitstatus == 0 and counts["passed"] > 0
        found = {"passed": passed, "counts": dict(counts), "tests": self._tests}
        write("pytest", found, torch.device("cuda"), self._folder)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels under test run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
