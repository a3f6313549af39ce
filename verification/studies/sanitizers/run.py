"""Starts a program under a tool, in a process of its own, and reads what the tool says."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from mxref.verification.studies.sanitizers import workload
from mxref.verification.studies.sanitizers.tools import Report, Tool, read_report


def command(tool: Tool, work: str) -> list[str]:
    """The command line."""
    return [*tool.before, sys.executable, "-m", workload.__name__, work]


def watch(tool: Tool, work: str, seconds: float) -> tuple[Report, str]:
    """What a tool finds in one of `workload.WORK`, and all that was printed.

    A tool that is not installed, or a program that takes longer, is a problem of the report.
    """
    with tempfile.TemporaryDirectory() as cache:  # kernels are compiled anew: instrumented code must not stay behind
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, **tool.environment}
        environment.pop("TRITON_INTERPRET", None)
        try:
            done = subprocess.run(
                command(tool, work), env=environment, timeout=seconds, text=True, errors="replace", check=False,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except FileNotFoundError:
            return Report({}, f"{tool.before[0]} is not on the PATH; it comes with the CUDA toolkit"), ""
        except subprocess.TimeoutExpired as error:
            output = error.stdout or b""
            text = output.decode(errors="replace") if isinstance(output, bytes) else output
            return Report({}, f"not done after {seconds:.0f} s"), text
    return read_report(tool, done.stdout, done.returncode), done.stdout


def payload(reports: Sequence[tuple[Tool, str, Report]]) -> dict[str, Any]:
    """What to keep: a tool and a program a row, then a finding a row."""
    return {
        "passed": all(report.clean == (work == workload.KERNELS) and not report.problem for _, work, report in reports),
        "runs": [
            {
                "tool": tool.name,
                "program": work,
                "findings": sum(report.findings.values()),
                "problem": report.problem,
                "unwatched": list(report.unwatched),
            }
            for tool, work, report in reports
        ],
        "findings": [
            {"tool": tool.name, "program": work, "finding": finding, "times": times}
            for tool, work, report in reports
            for finding, times in report.findings.items()
        ],
    }
