"""Benchmarks run when they are asked for: `pytest tests/bench -m gpu`, never as a part of the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from mxref.verification.bench import report, workloads
from mxref.verification.bench.benchmark import Bench, gate_paths, run_benchmark
from mxref.verification.bench.paths import every_path
from mxref.verification.bench.racing import Effort
from mxref.verification.bench.timing import clock_for, measure_ceilings
from mxref.verification.gate.run import describe_device
from mxref.verification.records.ulp_baseline import architecture_name

_HERE = Path(__file__).resolve().parent
_BENCH = pytest.StashKey[Bench]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-large", action="store_true", help="time the DeepSeek-V4-like shapes too")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """One storage a GPU: pytest-benchmark's folder names the host's processor, not the GPU."""
    if torch.cuda.is_available() and getattr(config.option, "benchmark_storage", None) == "file://./.benchmarks":
        config.option.benchmark_storage = f"file://./.benchmarks/{architecture_name(torch.device('cuda'))}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the benchmarks out unless an argument names this folder or one of its files; the large ones need a word."""
    asked = any(_HERE in (path := Path(arg.split("::")[0]).resolve()).parents or path == _HERE for arg in config.args)
    if not asked and not config.getoption("benchmark_only", False):
        ours = [item for item in items if _HERE in item.path.parents]
        config.hook.pytest_deselected(items=ours)
        items[:] = [item for item in items if _HERE not in item.path.parents]
    if not config.getoption("bench_large", False):
        large = {shape.name for shape in workloads.LARGE}
        left_out = [item for item in items if _shape(item) in large]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _shape(item: pytest.Item) -> str | None:
    """The shape that a benchmark is about; None for any other test."""
    is_ours = _HERE in item.path.parents and isinstance(item, pytest.Function)
    return str(item.callspec.params["shape"]) if is_ours and hasattr(item, "callspec") else None


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Bench:
    """The gate, then everything that the selected tests report, measured once."""
    device = torch.device("cuda")
    wanted = {_shape(item) for item in request.session.items}
    shapes = [shape for shape in (*workloads.CASES, *workloads.LARGE) if shape.name in wanted]
    paths = every_path()
    result = Bench(describe_device(device), gate_paths(paths, device), Effort())
    request.config.stash[_BENCH] = result
    if result.green:
        clock = clock_for(device)
        run_benchmark(result, shapes, paths, device, clock, lambda: measure_ceilings(clock, device))
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if _BENCH in config.stash:
        width = 160 if not terminalreporter.hasmarkup else None
        report.print_bench(config.stash[_BENCH], Console(width=width))
