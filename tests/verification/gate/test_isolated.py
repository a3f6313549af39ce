"""Whatever becomes of the candidate's process, a verdict comes of it, and it names who is to blame."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mxref.verification.checks.finding import Finding, Status
from mxref.verification.gate import isolated
from mxref.verification.gate.isolated import judge_apart, list_items
from mxref.verification.gate.order import Order
from mxref.verification.gate.process import Asking, Fault, ItemInfo, Judged, Numbers, Refused
from mxref.verification.gate.result import GateResult

CANDIDATES = """
import atexit, ctypes, os, signal, sys, time
from pathlib import Path
import torch
import mxref

def with_gates(do):
    def layer(**operands):
        y = mxref.parallel_linear_lora(**operands)
        if operands["gates"] is not None:
            do()
        return y
    return layer

def interrupt():
    raise KeyboardInterrupt

def spin():
    while True:
        pass

def nothing():
    pass

def lacks_memory_once():
    if not Path("asked").exists():
        Path("asked").touch()
        raise torch.OutOfMemoryError("CUDA out of memory")

short = with_gates(lacks_memory_once)
ends = with_gates(lambda: os._exit(0))
crashes = with_gates(lambda: os.kill(os.getpid(), signal.SIGSEGV))
crashes_later = with_gates(lambda: atexit.register(os.kill, os.getpid(), signal.SIGSEGV))
killed = with_gates(lambda: os.kill(os.getpid(), signal.SIGKILL))
spins = with_gates(spin)
exits = with_gates(lambda: sys.exit(0))
interrupts = with_gates(interrupt)
leaks = with_gates(lambda: torch.set_default_dtype(torch.float64))
sets_device = with_gates(lambda: torch.set_default_device("meta"))
honest = with_gates(nothing)

def waits(**operands):
    Path("waiting").write_text(str(os.getpid()))
    time.sleep(3600)
"""
IMPORTS = """
import sys, torch

def touched(*_):
    raise AssertionError("a GPU was looked for")

torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = torch._C._cuda_getDeviceCount = touched
__import__(sys.argv[1])
print(torch.cuda.is_initialized(), "mxref.kernels" in sys.modules)
"""
TWO = ("integer, plain", "integer, biases and gates")
SHAPE = (2, 32, 32, 4, 2, 2)
"""One small problem: no process has to plan a suite."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (tmp_path / "candidates.py").write_text(CANDIDATES)
    return tmp_path


def judged(name: str, timeout: float = isolated.TIMEOUT, fail_fast: bool = False) -> GateResult:
    order = Order(f"candidates.py:{name}", "cpu", patterns=TWO, shape=SHAPE)
    return judge_apart(order, suite="two cases", timeout=timeout, fail_fast=fail_fast)


def failed(result: GateResult) -> list[Finding]:
    return [finding for finding in result.findings if finding.status is Status.FAIL]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ends", "its process ended itself with exit status 0"),
        ("crashes", "its process crashed (SIGSEGV)"),
        ("killed", "its process was killed (SIGKILL)"),
        ("spins", "of processor time and was ended"),
        ("exits", "raised SystemExit: 0"),
        ("interrupts", "raised KeyboardInterrupt"),
        ("leaks", "default dtype changed: float32 → float64"),
        ("sets_device", "default device changed: cpu → meta"),
    ],
)
def test_what_a_candidate_does_to_its_process_is_a_failure(name: str, reason: str) -> None:
    result = judged(name, timeout=10.0)
    reasons = [finding.reason for finding in failed(result)]
    assert any(reason in each for each in reasons)
    assert all(reason.split(" changed")[0] in each for each in reasons), "nothing else is told"
    assert (result.word, result.exit_code, result.faults) == ("FAIL", 1, [])
    assert any(f.case == TWO[0] and f.status is Status.PASS for f in result.findings)


@pytest.mark.parametrize(("kernel", "ahead"), [("shipped", True), ("mxref.kernels", True), ("golden", False)])
def test_the_shipped_kernels_are_compiled_ahead_by_either_name(
    kernel: str, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = list[Order]()
    monkeypatch.setattr("mxref.verification.gate.own.ahead.compiling_ahead", lambda order, _: compiled.append(order))
    order, numbers = Order(kernel, "cuda"), Numbers([])
    isolated._compiling(order, numbers)
    assert compiled == [order] * ahead
    isolated._compiling(Order(kernel, "cpu"), numbers)
    assert compiled == [order] * ahead


def test_a_crash_says_where() -> None:
    (finding,) = failed(judged("crashes"))
    assert "candidates.py" in finding.trace
    assert finding.id


def test_a_crash_when_everything_is_judged_changes_no_verdict() -> None:
    """As drivers and libraries may when an interpreter ends."""
    result = judged("crashes_later")
    assert (result.exit_code, failed(result), result.left_out) == (0, [], "")


def test_an_interruption_ends_with_what_is_known() -> None:
    """Ctrl-C after an item; before the first there is nothing to tell."""

    def interrupted_at(item: int) -> GateResult:
        def interrupt(entry: ItemInfo, done: int, total: int) -> None:
            if done == item:
                raise KeyboardInterrupt

        order = Order("candidates.py:honest", "cpu", patterns=TWO, shape=SHAPE)
        return judge_apart(order, suite="two cases", on_item=interrupt)

    result = interrupted_at(1)
    assert (result.word, result.exit_code, failed(result)) == ("NO VERDICT", 2, [])
    assert result.left_out == "1 of 2 items were not asked: it was interrupted."
    assert {f.case for f in result.findings if f.check != "state"} == {TWO[0]}
    with pytest.raises(KeyboardInterrupt):
        interrupted_at(0)


def test_an_honest_candidate_keeps_torch_s_state() -> None:
    result = judged("honest")
    part = "shape 2,32,32,4,2,2 in float32, cases matching integer, plain or integer, biases and gates"
    assert (result.exit_code, result.title) == (0, f"PASS ({part} only)")
    assert [(f.check, f.status) for f in result.findings][-1] == ("state", Status.PASS)


@pytest.mark.parametrize(("told", "losses"), [({}, 3), ({"losses": 5}, 5)])
def test_after_so_many_losses_the_rest_is_not_asked(told: dict[str, int], losses: int, folder: Path) -> None:
    (folder / "loaded").unlink(missing_ok=True)
    (folder / "ever.py").write_text(CANDIDATES + "\ndef ever(**o):\n    if Path('loaded').exists(): os._exit(3)\n"
                                    "    Path('loaded').touch()\n    return honest(**o)\n")  # fmt: skip
    result = judge_apart(Order("ever.py:ever", "cpu", patterns=("integer",)), suite="", **told)
    assert [finding.check for finding in failed(result)] == ["loading", "integer"]
    assert f"items were not asked: {losses} processes were lost" in result.left_out
    assert result.exit_code == 1


def test_fail_fast_stops_at_the_first_failure() -> None:
    result = judged("exits", fail_fast=True)
    assert len(failed(result)) == 1
    everything = judge_apart(Order("composite", "cpu", patterns=TWO, shape=SHAPE), suite="")
    assert everything.exit_code == 0
    assert everything.left_out == ""


def test_what_found_too_little_memory_beside_others_is_asked_again_alone() -> None:
    order = Order("candidates.py:short", "cpu", patterns=TWO, shape=SHAPE)
    result = judge_apart(order, suite="two cases", processes=2)
    assert (result.exit_code, failed(result), result.left_out) == (0, [], "")
    assert {finding.case for finding in result.findings} >= set(TWO)


def test_too_little_memory_alone_is_a_failure() -> None:
    (finding,) = failed(judged("short"))
    assert "raised OutOfMemoryError" in finding.reason


def test_a_fault_of_ours_is_not_the_candidate_s() -> None:
    run = isolated._Run(Order("golden", "cpu"), "", False)
    run.entries = [ItemInfo("00000000", ("integer",), "a"), ItemInfo("00000001", ("integer",), "b")]
    part = isolated._Part(Order("golden", "cpu"), Numbers(range(2)), 1, Path("crash"))
    for message in (Asking(0), Fault("integer, a: OutOfMemoryError"), Judged(0, []), Asking(1, compared=True)):
        run.hear(part, message)
    assert not run.lost(part, isolated.Ended(-signal.SIGKILL))
    run.close()
    assert (run.result.word, run.result.exit_code) == ("NO VERDICT", 2)
    assert len(run.result.faults) == 2


def test_what_cannot_be_carried_out_is_refused() -> None:
    with pytest.raises(Refused, match=r"no file absent\.py"):
        judge_apart(Order("absent.py:layer", "cpu"), suite="")
    with pytest.raises(Refused, match="--rerun 00000000 matches nothing"):
        list_items(Order("golden", "cpu", rerun=("00000000",), shape=SHAPE))


def test_an_identifier_asks_one_item_again() -> None:
    order = Order("golden", "cpu", patterns=TWO, shape=SHAPE)
    entries = list_items(order)
    assert len({entry.id for entry in entries}) == len(entries) > 1
    (again,) = list_items(Order("golden", "cpu", rerun=(entries[1].id,), shape=SHAPE))
    assert again == entries[1]
    with pytest.raises(Refused, match="--rerun 00000000 matches nothing"):
        list_items(Order("golden", "cpu", rerun=(entries[1].id, "00000000"), shape=SHAPE))


def test_the_process_dies_with_the_one_that_asks(folder: Path) -> None:
    script = (
        "from mxref.verification.gate.isolated import judge_apart; from mxref.verification.gate.order import Order\n"
        f"if __name__ == '__main__':\n    judge_apart(Order('candidates.py:waits', 'cpu', shape={SHAPE}), suite='')\n"
    )
    (folder / "ask.py").write_text(script)
    asking = subprocess.Popen([sys.executable, "ask.py"])
    try:
        while not (folder / "waiting").exists() or not (folder / "waiting").read_text():
            assert asking.poll() is None
            time.sleep(0.1)
        child = int((folder / "waiting").read_text())
    finally:
        asking.kill()
        asking.wait()
    while Path(f"/proc/{child}").exists() and " Z " not in Path(f"/proc/{child}/stat").read_text():
        time.sleep(0.1)
    assert child != os.getpid()


def test_what_every_process_begins_with_has_touched_no_gpu_and_decided_nothing() -> None:
    """A GPU that was looked for is none for forks; kernels are interpreted or not from their import on."""
    done = subprocess.run([sys.executable, "-c", IMPORTS, isolated.work.__module__], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["False", "False"]), done.stderr


def test_what_a_candidate_replaces_when_it_is_imported_is_told(folder: Path) -> None:
    with (folder / "candidates.py").open("a") as file:
        file.write("\ntorch.equal = lambda *tensors: True\n")
    wrong = failed(judged("honest"))
    assert {finding.check for finding in wrong} == {"state"}
    assert "torch.equal was replaced" in wrong[0].reason
