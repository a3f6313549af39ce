"""On a GPU only: a process that is told so sleeps while it waits for the GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

_WAITING = """
import time, torch
from mxref.verification.candidates.driver import wait_asleep
wait_asleep(torch.device("cuda"))
clock, processor = time.monotonic(), time.process_time()
torch.cuda._sleep(3_000_000_000)
torch.cuda.synchronize()
print(time.monotonic() - clock, time.process_time() - processor)
"""


def test_it_waits_asleep() -> None:
    run = subprocess.run([sys.executable, "-c", _WAITING], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    clock, processor = (float(seconds) for seconds in run.stdout.split())
    assert clock > 1
    assert processor < 0.1 * clock
