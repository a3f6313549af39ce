"""Global state of torch that a call may not change: what the next call, anybody's, would see."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch

from mxref.verification.candidates.answer import UnusableAnswerError

_SUBNORMAL = 1e-40
_USUAL = "ieee"
_SUMS = (
    "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation",
)  # fmt: skip


@dataclass(frozen=True)
class GlobalState:
    """One look at it. Fields are compared by equality; their names are what a finding calls them."""

    default_dtype: torch.dtype
    default_device: str
    deterministic_algorithms: tuple[bool, bool]
    threads: int
    gradients_enabled: bool
    inference_mode: bool
    autocast: tuple[bool, bool]
    autocast_dtypes: tuple[torch.dtype, torch.dtype]
    random_numbers: tuple[int, ...]
    fp32_products: tuple[str, ...]
    sums_in_16_bits: tuple[Any, ...]
    flush_to_zero: bool
    active_modes: tuple[int, int]
    tracing: tuple[Any, Any]
    hooks_of_saved_tensors: bool
    anomaly_mode: bool

    @classmethod
    def now(cls) -> GlobalState:
        """The state at this moment."""
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        matmul = torch.backends.cuda.matmul
        generators = [torch.random.get_rng_state(), *([torch.cuda.get_rng_state()] if cuda else [])]
        return cls(
            torch.get_default_dtype(),
            str(torch.get_default_device()),
            _deterministic(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
            (torch.get_autocast_dtype("cpu"), torch.get_autocast_dtype("cuda")),
            (*(hash(state.numpy().tobytes()) for state in generators), *_others_random_numbers()),
            _precisions(),
            tuple(getattr(matmul, name, None) for name in _SUMS),
            float(torch.tensor(_SUBNORMAL, dtype=torch.float32, device="cpu") * 1) == 0.0,
            (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
            (sys.gettrace(), sys.getprofile()),
            torch._C._autograd._top_saved_tensors_default_hooks(False) is not None,
            torch.is_anomaly_enabled(),
        )

    def changes(self, before: GlobalState) -> dict[str, str]:
        """What is different now, in words by name."""
        changed = {}
        for field in fields(self):
            was, value = getattr(before, field.name), getattr(self, field.name)
            if was != value:
                name = field.name.replace("_", " ")
                told = "" if field.name == "random_numbers" else f": {_plain(was)} → {_plain(value)}"
                changed[name] = f"{name} {'were drawn or seeded' if not told else 'changed'}{told}"
        return changed

    def restore(self) -> None:
        """Put back what can be put back, but for random numbers."""
        torch.set_default_dtype(self.default_dtype)
        if str(torch.get_default_device()) != self.default_device:  # even setting the same costs every later call
            torch.set_default_device(None if self.default_device == "cpu" else self.default_device)
        if _deterministic() != self.deterministic_algorithms:  # even setting the same imports the compiler
            enabled, warns = self.deterministic_algorithms
            torch.use_deterministic_algorithms(enabled, warn_only=warns)
        torch.set_num_threads(self.threads)
        torch.set_grad_enabled(self.gradients_enabled)
        torch.set_autocast_enabled("cpu", self.autocast[0])
        torch.set_autocast_enabled("cuda", self.autocast[1])
        for device_type, dtype in zip(("cpu", "cuda"), self.autocast_dtypes, strict=True):
            torch.set_autocast_dtype(device_type, dtype)
        if _precisions() != self.fp32_products:
            for each in _backends():
                each.fp32_precision = "none"
            # By the older interface too, which cannot be read where the two differ.
            torch.set_float32_matmul_precision("highest" if self.fp32_products[0] == _USUAL else "high")
        for name, value in zip(_SUMS, self.sums_in_16_bits, strict=True):
            if value is not None:
                setattr(torch.backends.cuda.matmul, name, value)
        torch.set_flush_denormal(self.flush_to_zero)
        while torch._C._len_torch_function_stack() > self.active_modes[0]:
            torch._C._pop_torch_function_stack()
        while torch._C._len_torch_dispatch_stack() > self.active_modes[1]:
            torch._C._pop_torch_dispatch_stack()
        while (
            not self.hooks_of_saved_tensors and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        ):
            torch._C._autograd._pop_saved_tensors_default_hooks()
        torch.autograd.set_detect_anomaly(self.anomaly_mode)
        traces, profiles = self.tracing
        if sys.gettrace() is not traces:
            sys.settrace(traces)
        if sys.getprofile() is not profiles:  # cProfile is there without being callable
            sys.setprofile(profiles)


class _Modes(NamedTuple):
    """What surrounds a call in force, the caller's own, which ends with it and so hides that it was changed."""

    default_dtype: torch.dtype
    deterministic_algorithms: tuple[bool, bool]
    gradients_enabled: bool
    inference_mode: bool
    autocast: tuple[bool, bool]

    @classmethod
    def now(cls) -> _Modes:
        return cls(
            torch.get_default_dtype(),
            _deterministic(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        )


@contextmanager
def modes_unchanged(what: str) -> Iterator[None]:
    """Raises an UnusableAnswerError about `what` if the modes that it ran under are others behind it."""
    before = _Modes.now()
    yield
    for name, was, found in zip(_Modes._fields, before, _Modes.now(), strict=True):
        if was != found:
            told = f"{name.replace('_', ' ')} {_plain(was)} → {_plain(found)}"
            raise UnusableAnswerError(f"its {what} leaves other modes than it was called under: {told}")


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _precisions() -> tuple[str, ...]:
    """Of fp32 products, by the interface that tells them apart; what was never set is the usual one."""
    return tuple(each.fp32_precision.replace("none", _USUAL) for each in _backends())


def _backends() -> tuple[Any, ...]:
    onednn: Any = torch.backends.mkldnn
    return torch.backends.cuda.matmul, onednn.matmul, torch.backends


def _plain(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _others_random_numbers() -> tuple[int, int]:
    """Those of Python and of NumPy."""
    return hash(random.getstate()), hash(repr(np.random.get_state()))
