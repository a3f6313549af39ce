"""`mxref sanitize`: what the tools' outputs mean, how they are started, and the table; a GPU runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from uninterpreted import run_python

from mxref.verification.cli import main
from mxref.verification.cli.own import sanitize as command
from mxref.verification.studies.sanitizers import run
from mxref.verification.studies.sanitizers.run import payload, watch
from mxref.verification.studies.sanitizers.tools import DONE, TOOLS, Report, Tool, read_report
from mxref.verification.studies.sanitizers.workload import KERNELS, WORK

CLEAN = f"========= COMPUTE-SANITIZER\ncase small\n{DONE}\n========= ERROR SUMMARY: 0 errors\n"
MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at planted_read+0x70
=========     by thread (0,0,0) in block (0,0,0)
=========     Access to 0x7f5c3a400000 is out of bounds
=========     and is 4193793 bytes after the nearest allocation at 0x7f5c3a000000 of size 512 bytes
=========
========= Invalid __global__ read of size 4 bytes
=========     at planted_read+0x70
=========     by thread (1,0,0) in block (0,0,0)
=========
========= Program hit cudaErrorLaunchFailure (error 719) due to "unspecified launch failure" on CUDA API call
=========     Saved host backtrace up to driver entry point at error
========= ERROR SUMMARY: 3 errors
"""
RACECHECK = f"""\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at planted_race+0x90
=========     and Read access at planted_race+0xd0 [512 hazards]
=========
{DONE}
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
INITCHECK = f"""\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at 0x150 in void at::native::vectorized_elementwise_kernel<4, float>(int, float)
=========     by thread (0,0,0) in block (0,0,0)
{DONE}
========= ERROR SUMMARY: 1 error
"""
CONSAN = """\
planted.py:22: planted_copy: block: [0,0,0], thread: [0,0,0] Assertion `Buffer being accessed has outstanding writes` failed.
planted.py:22: planted_copy: block: [0,0,0], thread: [1,0,0] Assertion `Buffer being accessed has outstanding writes` failed.
torch.AcceleratorError: CUDA error: device-side assert triggered
"""  # noqa: E501


def findings(tool: str, output: str, code: int = 0) -> dict[str, int]:
    report = read_report(TOOLS[tool], output, code)
    assert not report.problem
    return dict(report.findings)


def test_what_the_tools_find() -> None:
    read = "Invalid __global__ read of size 4 bytes, planted_read"
    assert findings("memcheck", MEMCHECK, 97)[read] == 2
    assert sum(findings("memcheck", MEMCHECK, 97).values()) == 3
    assert findings("racecheck", RACECHECK, 97) == {
        "Error: Race reported between Write access at planted_race": 1
    }  # the kernel stands in the finding itself
    [uninitialised] = findings("initcheck", INITCHECK, 97)
    assert uninitialised.startswith("Uninitialized __global__ memory read of size 4 bytes, ")
    assert findings("consan", CONSAN, 1) == {"Buffer being accessed has outstanding writes, planted_copy": 2}


def test_what_cannot_be_instrumented_is_named() -> None:
    output = f"case small\nmxref: not instrumented: long\nmxref: not instrumented: long\n{DONE}\n"
    report = read_report(TOOLS["consan"], output, 0)
    assert report == Report({}, unwatched=("long",))
    assert report.clean
    lost = read_report(TOOLS["consan"], output.replace(DONE, ""), 1)
    assert not lost.clean


@pytest.mark.parametrize("tool", TOOLS)
def test_nothing_found(tool: str) -> None:
    summary = "" if tool == "consan" else "========= ERROR SUMMARY: 0 errors\n"
    assert read_report(TOOLS[tool], f"{DONE}\n{summary}", 0).clean


@pytest.mark.parametrize(
    ("tool", "output", "code", "problem"),
    [
        ("memcheck", "Device not supported\n", 1, "gave no summary"),
        ("memcheck", CLEAN.replace(DONE, "Traceback"), 1, "did not come to its end"),
        ("memcheck", CLEAN, 1, "did not come to its end"),
        ("consan", "Traceback\nRuntimeError: no allocator\n", 1, "RuntimeError: no allocator"),
        ("consan", "", 0, "it printed nothing"),
    ],
)
def test_silence_is_no_pass(tool: str, output: str, code: int, problem: str) -> None:
    report = read_report(TOOLS[tool], output, code)
    assert problem in report.problem
    assert not report.clean


def test_errors_that_nobody_understands_are_findings() -> None:
    assert not read_report(TOOLS["memcheck"], CLEAN.replace("0 errors", "7 errors"), 97).clean


def test_each_tool_has_a_mistake_to_find_and_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []

    def start(command: list[str], env: dict[str, str], **rest: object) -> subprocess.CompletedProcess[str]:
        started.append((command, env))
        return subprocess.CompletedProcess(command, 0, CLEAN)

    monkeypatch.setattr(run.subprocess, "run", start)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for tool in TOOLS.values():
        assert tool.planted in WORK
        watch(tool, KERNELS, 1.0)
    assert [command[:3] for command, _ in started[:3]] == [
        ["compute-sanitizer", "--tool", name] for name in ("memcheck", "racecheck", "initcheck")
    ]
    assert all(command[-1] == KERNELS and "TRITON_INTERPRET" not in env for command, env in started)
    assert started[3][1]["TRITON_INSTRUMENTATION_MODE"] == "consan"
    assert len({env["TRITON_CACHE_DIR"] for _, env in started}) == len(started)


def test_a_tool_that_is_not_there_and_a_program_without_end(tmp_path: Path) -> None:
    absent = Tool("absent", "race", ("no-such-program-here",))
    assert "not on the PATH" in watch(absent, KERNELS, 1.0)[0].problem
    slow = Tool("slow", "race", (sys.executable, "-c", "import time; time.sleep(60)"))
    assert "not done after" in watch(slow, KERNELS, 1.0)[0].problem


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The command with a GPU and tools that find what `planted` and `kernels` say."""

    def arrange(planted: Report, kernels: Report) -> None:
        monkeypatch.setattr(command, "choose_device", lambda wanted: torch.device("cuda"))
        monkeypatch.setattr(
            command, "watch", lambda tool, work, seconds: (kernels if work == KERNELS else planted, "all of it")
        )

    return arrange


FOUND, NOTHING, LOST = Report({"a race, a_kernel": 2}), Report({}), Report({}, "not done after 900 s")


@pytest.mark.parametrize(
    ("planted", "kernels", "code"),
    [(FOUND, NOTHING, 0), (NOTHING, NOTHING, 1), (FOUND, FOUND, 1), (FOUND, LOST, 1), (LOST, NOTHING, 1)],
)
def test_exit_codes(gpu: Callable[..., None], planted: Report, kernels: Report, code: int) -> None:
    gpu(planted, kernels)
    assert main(["sanitize", "--self-test"]) == code


def test_the_table_and_the_outputs(
    gpu: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu(FOUND, NOTHING)
    assert main(["sanitize", "--tool", "racecheck", "--self-test", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "a race, a_kernel" in told
    assert "nothing found" in told
    assert {path.name for path in tmp_path.iterdir()} == {"racecheck-race.txt", "racecheck-kernels.txt"}


def test_wrong_use() -> None:
    assert main(["sanitize", "--tool", "memcheck", "--record"]) == 2
    if not torch.cuda.is_available():
        assert main(["sanitize"]) == 2


def test_what_is_kept() -> None:
    kept = payload([(TOOLS["racecheck"], "race", FOUND), (TOOLS["racecheck"], KERNELS, NOTHING)])
    assert kept["passed"]
    assert kept["findings"] == [{"tool": "racecheck", "program": "race", "finding": "a race, a_kernel", "times": 2}]


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from mxref.verification.studies.sanitizers.planted import planted_copy

for mode in ("", "consan"):
    source = GluonASTSource(planted_copy, {"x": "*fp32", "y": "*fp32"}, {})
    options = {"num_warps": 4, "instrumentation_mode": mode}
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print("outstanding writes" in code.asm["llir"])
"""


def test_the_planted_copy_compiles_and_is_watched(tmp_path: Path) -> None:
    """Without a GPU, in a process whose kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


FORESEEN = """
import torch
from mxref.verification.candidates.shipped import shipped
from mxref.verification.studies.sanitizers import workload

class Pool:
    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, compile_unit, units):
        for unit in units:
            print(unit.kernel)
            yield


workload.ProcessPoolExecutor = Pool
workload._compile(shipped(torch.device("cpu")), workload._cases()[:1], "sm_90")
"""


def test_what_is_instrumented_is_compiled_before() -> None:
    done = run_python("-c", FORESEEN)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = done.stdout.split()
    assert compiled.count("packed_matmul_kernel") == 2, "forward and dX"
    assert "grouped_outer_kernel" in compiled


@pytest.mark.gpu
@pytest.mark.minutes
def test_the_tools_find_what_is_planted_and_nothing_else() -> None:
    assert main(["sanitize", "--self-test"]) == 0
