"""Every sample of a benchmark in pytest-benchmark's storage, so that its own commands list and compare runs.

    pytest-benchmark compare 'nvidia-h100*/0001' 'nvidia-h100*/0004' --group-by=group --columns=median,iqr,rounds

A storage folder of pytest-benchmark names the host's processor; here a GPU has one of its own. What may not become
slower is `mxref history`'s business, on ratios.
"""

from __future__ import annotations

import logging
from itertools import chain
from pathlib import Path
from typing import Any

import pytest_benchmark
from pytest_benchmark.stats import Stats
from pytest_benchmark.storage.file import FileStorage
from pytest_benchmark.utils import get_commit_info

from mxref.verification.bench.benchmark import Bench
from mxref.verification.bench.pairs import Row


def keep_samples(bench: Bench, folder: Path, device: str) -> None:
    """Add a run to the storage.

    Args:
        bench: the run.
        folder: the storage, with one folder a device.
        device: that folder's name.

    Raises:
        OSError: the folder cannot be written to.
    """
    run = {
        "machine_info": {"device": bench.device},
        "commit_info": get_commit_info(),
        "benchmarks": [_benchmark(row) for row in bench.rows if row.ok],
        "datetime": bench.started,
        "version": pytest_benchmark.__version__,
    }
    storage = FileStorage(folder, logging.getLogger(__name__), default_machine_id=device)
    storage.save(run, bench.commit.rstrip("+") or "unversioned")


def _benchmark(row: Row) -> dict[str, Any]:
    stats = Stats()
    for sample in chain.from_iterable(row.samples):
        stats.update(sample)
    return {
        "group": f"{row.shape}, {row.measure}",
        "name": row.path,
        "fullname": f"{row.shape}, {row.measure}, {row.path}",
        "params": None,
        "param": None,
        "extra_info": {"mode": row.mode, "ratio": row.ratio, "limit_ratio": row.limit_ratio, "eager": row.eager},
        "options": {},
        "stats": stats.as_dict() | {"data": stats.data, "iterations": 1},
    }
