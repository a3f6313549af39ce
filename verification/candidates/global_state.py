"""Global state of torch that a call may not change: what the next call, anybody's, would see."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mxref.verification.candidates.answer import UnusableAnswerError

_SUBNORMAL = 1e-40
_SUMS = "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation"
_USUAL = "ieee"
_DRAWN = "random numbers"
_onednn: Any = torch.backends.mkldnn


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _random_numbers() -> tuple[int, ...]:
    """Of torch, Python and NumPy."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    own = [torch.random.get_rng_state(), *([torch.cuda.get_rng_state()] if cuda else [])]
    others = hash(random.getstate()), hash(repr(np.random.get_state()))
    return *(hash(state.numpy().tobytes()) for state in own), *others


def _backends() -> tuple[Any, ...]:
    return torch.backends.cuda.matmul, _onednn.matmul, torch.backends


def _hooks() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


_MODES: dict[str, Callable[[], Any]] = {
    "default dtype": torch.get_default_dtype,
    "deterministic algorithms": _deterministic,
    "gradients enabled": torch.is_grad_enabled,
    "inference mode": torch.is_inference_mode_enabled,
    "autocast": lambda: (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
}
"""What may surround a call in force, the caller's own: it ends with that, which hides that it was changed."""

_READ: dict[str, Callable[[], Any]] = _MODES | {
    "default device": lambda: str(torch.get_default_device()),
    "threads": torch.get_num_threads,
    "autocast dtypes": lambda: (torch.get_autocast_dtype("cpu"), torch.get_autocast_dtype("cuda")),
    _DRAWN: _random_numbers,
    # By the interface that tells backends apart; what was never set is the usual one.
    "fp32 products": lambda: tuple(each.fp32_precision.replace("none", _USUAL) for each in _backends()),
    "sums in 16 bits": lambda: tuple(getattr(torch.backends.cuda.matmul, name, None) for name in _SUMS),
    "flush to zero": lambda: float(torch.tensor(_SUBNORMAL, dtype=torch.float32, device="cpu") * 1) == 0.0,
    "active modes": lambda: (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
    "tracing": lambda: (sys.gettrace(), sys.getprofile()),
    "hooks of saved tensors": _hooks,
    "anomaly mode": torch.is_anomaly_enabled,
}
"""How each part is read, by what a finding calls it."""


@dataclass(frozen=True)
class GlobalState:
    """One look at it: values by name."""

    values: dict[str, Any]

    @classmethod
    def now(cls, names: Iterable[str] = _READ) -> GlobalState:
        """The state at this moment."""
        return cls({name: _READ[name]() for name in names})

    def changes(self, before: GlobalState) -> dict[str, str]:
        """What is different now, in words by name."""
        changed = {}
        for name, was in before.values.items():
            if was != self.values[name]:
                told = f"changed: {_plain(was)} → {_plain(self.values[name])}"
                changed[name] = f"{name} {'were drawn or seeded' if name == _DRAWN else told}"
        return changed

    def restore(self) -> None:
        """Put back what can be put back, but for random numbers."""
        was = self.values
        torch.set_default_dtype(was["default dtype"])
        if str(torch.get_default_device()) != was["default device"]:  # even setting the same costs every later call
            torch.set_default_device(None if was["default device"] == "cpu" else was["default device"])
        if _deterministic() != was["deterministic algorithms"]:  # even setting the same imports the compiler
            enabled, warns = was["deterministic algorithms"]
            torch.use_deterministic_algorithms(enabled, warn_only=warns)
        torch.set_num_threads(was["threads"])
        torch.set_grad_enabled(was["gradients enabled"])
        for place, device_type in enumerate(("cpu", "cuda")):
            torch.set_autocast_enabled(device_type, was["autocast"][place])
            torch.set_autocast_dtype(device_type, was["autocast dtypes"][place])
        if _READ["fp32 products"]() != was["fp32 products"]:
            for each in _backends():
                each.fp32_precision = "none"
            # By the older interface too, which cannot be read where the two differ.
            torch.set_float32_matmul_precision("highest" if was["fp32 products"][0] == _USUAL else "high")
        for name, value in zip(_SUMS, was["sums in 16 bits"], strict=True):
            if value is not None:
                setattr(torch.backends.cuda.matmul, name, value)
        torch.set_flush_denormal(was["flush to zero"])
        while torch._C._len_torch_function_stack() > was["active modes"][0]:
            torch._C._pop_torch_function_stack()
        while torch._C._len_torch_dispatch_stack() > was["active modes"][1]:
            torch._C._pop_torch_dispatch_stack()
        while not was["hooks of saved tensors"] and _hooks():
            torch._C._autograd._pop_saved_tensors_default_hooks()
        torch.autograd.set_detect_anomaly(was["anomaly mode"])
        traces, profiles = was["tracing"]
        if sys.gettrace() is not traces:
            sys.settrace(traces)
        if sys.getprofile() is not profiles:  # cProfile is there without being callable
            sys.setprofile(profiles)


@contextmanager
def modes_unchanged(what: str) -> Iterator[None]:
    """Raises an UnusableAnswerError about `what` if the modes that it ran under are others behind it."""
    before = GlobalState.now(_MODES)
    yield
    for told in GlobalState.now(_MODES).changes(before).values():
        raise UnusableAnswerError(f"its {what} leaves other modes than it was called under: {told}")


def _plain(value: Any) -> str:
    return str(value).removeprefix("torch.")
