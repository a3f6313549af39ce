"""Guard pages: on a GPU, tensors whose last byte lies right before addresses that nothing is mapped to.

A load behind a tensor's end usually finds some other tensor and a mask drops what it brings, so that no result tells.
Here it faults, as it would one day for a user whose tensor lies at the end of a segment. CUDA's virtual memory gives
the addresses: a range is reserved, and all of it but the last piece is backed by memory. A fault ends the use of the
GPU in its process.
"""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from mxref.verification.candidates.driver import call_driver
from mxref.verification.candidates.memory import Allocations
from mxref.verification.cases.case import Sample

_ALIGNMENT = 16
"""Bytes: kernels are compiled for operands that begin at such multiples, so up to fifteen bytes lie before the page."""


class GuardPages(Allocations):
    """While active, what Python code allocates or clones on the device ends at a guard page."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device, self._pieces = device, list[_Mapped]()

    def place(self, fresh: Tensor) -> Tensor:
        """Garbage, before a guard page."""
        size = fresh.numel() * fresh.element_size()
        if not size or fresh.device.type != "cuda":
            return fresh
        self._pieces.append(piece := _Mapped(size, self._device))
        memory = torch.as_tensor(piece, device=self._device).fill_(0xFF)  # as a number NaN, as an index −1
        start = (memory.numel() - size) // _ALIGNMENT * _ALIGNMENT
        return memory[start : start + size].view(fresh.dtype).view(fresh.shape)

    def release(self) -> None:
        """Unmap everything; nothing that lies here may be used again."""
        torch.cuda.synchronize(self._device)
        for piece in self._pieces:
            piece.release()

    def sample(self, sample: Sample) -> Sample:
        """The sample with every operand before a guard page."""
        return sample.mapped(lambda _, operand: self.place(operand).copy_(operand.detach()))


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int), ("handles", ctypes.c_int), ("location", _Location), ("metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )  # fmt: skip


class _Access(ctypes.Structure):
    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


_PINNED, _ON_DEVICE, _READ_WRITE = 1, 1, 3
_Address, _Size = ctypes.c_ulonglong, ctypes.c_size_t


class _Mapped:
    """At least `size` bytes of a GPU's memory, then addresses without any.

    Source: CUDA driver API, «Virtual Memory Management».
    """

    def __init__(self, size: int, device: torch.device) -> None:
        location = _Location(_ON_DEVICE, device.index or 0)
        properties = _Properties(_PINNED, 0, location)
        piece, self._base, self._handle = _Size(), _Address(), _Address()
        call_driver("cuMemGetAllocationGranularity", ctypes.byref(piece), ctypes.byref(properties), ctypes.c_int(0))
        self._size = -(-size // piece.value) * piece.value
        mapped, reserved = _Size(self._size), _Size(self._size + piece.value)
        access = _Access(location, _READ_WRITE)
        with ExitStack() as undo:  # of what has been done, where the next step fails
            call_driver("cuMemAddressReserve", ctypes.byref(self._base), reserved, _Size(0), _Address(0), _Address(0))
            undo.callback(call_driver, "cuMemAddressFree", self._base, reserved)
            call_driver("cuMemCreate", ctypes.byref(self._handle), mapped, ctypes.byref(properties), _Address(0))
            undo.callback(call_driver, "cuMemRelease", self._handle)
            call_driver("cuMemMap", self._base, mapped, _Size(0), self._handle, _Address(0))
            undo.callback(call_driver, "cuMemUnmap", self._base, mapped)
            call_driver("cuMemSetAccess", self._base, mapped, ctypes.byref(access), _Size(1))
            self._undo = undo.pop_all()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self._size,), "typestr": "|u1", "data": (self._base.value, False), "version": 3}

    def release(self) -> None:
        """Give everything back."""
        self._undo.close()
