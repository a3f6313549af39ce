"""CUDA's driver API, for what torch does not offer."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

_OUT_OF_MEMORY = 2
_SCHEDULING, _ASLEEP = 0x07, 0x04


def call_driver(function: str, *arguments: Any) -> None:
    """Call a function of CUDA's driver.

    Raises:
        torch.OutOfMemoryError: there is too little memory.
        RuntimeError: it returns another error.
    """
    error: int = getattr(ctypes.CDLL("libcuda.so.1"), function)(*arguments)
    if error:
        kind = torch.OutOfMemoryError if error == _OUT_OF_MEMORY else RuntimeError
        raise kind(f"{function} failed with CUDA error {error}")


def wait_asleep(device: torch.device) -> None:
    """From now on this process sleeps while it waits for the GPU; otherwise it keeps a core busy.

    Source: CUDA driver API, «Primary Context Management», CU_CTX_SCHED_BLOCKING_SYNC.
    """
    torch.cuda.synchronize(device)  # torch has made its context, whose flags it does not change afterwards
    number, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
    call_driver("cuDeviceGet", ctypes.byref(number), ctypes.c_int(device.index or 0))
    call_driver("cuDevicePrimaryCtxGetState", number, ctypes.byref(flags), ctypes.byref(active))
    call_driver("cuDevicePrimaryCtxSetFlags_v2", number, ctypes.c_uint(flags.value & ~_SCHEDULING | _ASLEEP))
