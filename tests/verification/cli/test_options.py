"""What commands share of their options."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mxref.verification.cli import UsageError, options

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("cores", "gigabytes", "expected"), [(16, 85, 14), (64, 141, 16), (16, 24, 4), (16, 4, 1), (2, 85, 1)]
)
def test_as_many_processes_as_cores_and_a_gpu_s_memory_hold(
    cores: int, gigabytes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    monkeypatch.setattr(options, "cores", lambda: cores)
    assert options.processes_on(GPU, None) == expected
    assert options.processes_on(GPU, 3) == 3
    assert options.processes_on(CPU, None, alone=2) == 2
    with pytest.raises(UsageError, match="expected 1 to 64"):
        options.processes_on(CPU, 65)
