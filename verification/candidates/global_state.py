"""Global state of torch, NumPy and Python that a call may not change: what the next call, anybody's, would see."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mxref.verification.candidates.answer import UnusableAnswerError

_SUBNORMAL = 1e-40
_SUMS = "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation"
_USUAL = "ieee"
_DRAWN = "random numbers"
_SDP = "flash", "mem_efficient", "math", "cudnn"
_SIGNALS = signal.SIGINT, signal.SIGTERM
_VARIABLES = "OMP_", "MKL_", "CUBLAS_", "NCCL_", "NVIDIA_", "PYTORCH_", "CUDA_VISIBLE", "CUDA_LAUNCH"
"""How those of the environment begin that reach others; compilers and torch itself set some of other names."""
_backend: Any = torch.backends
_printing: Any = torch._tensor_str.PRINT_OPTS
_onednn: Any = torch.backends.mkldnn


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _random_numbers() -> tuple[int, ...]:
    """Of torch, Python and NumPy."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    own = [torch.random.get_rng_state(), *([torch.cuda.get_rng_state()] if cuda else [])]
    _, words, *rest = np.random.get_state()
    others = hash(random.getstate()), hash((np.asarray(words).tobytes(), *rest))
    return *(hash(state.numpy().tobytes()) for state in own), *others


def _backends() -> tuple[Any, ...]:
    return torch.backends.cuda.matmul, _onednn.matmul, torch.backends


def _hooks() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _is_blanket(each: Any) -> bool:
    """Whether a filter is of all modules' usual warnings: imports add some of their own."""
    _, message, category, module, _ = each
    return message is None and module is None and category.__module__ == "builtins"


def _blanket_filters() -> list[Any]:
    return list(filter(_is_blanket, warnings.filters))


def _filter_again(was: list[Any]) -> None:
    filters: Any = warnings.filters
    filters[:] = was + [each for each in filters if not _is_blanket(each)]
    warnings._filters_mutated()  # type: ignore[attr-defined]


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}


def _set_environment(was: dict[str, str]) -> None:
    for name in _environment().keys() - was.keys():
        del os.environ[name]
    os.environ.update(was)


def _set_sdp(was: list[bool]) -> None:
    for name, enabled in zip(_SDP, was, strict=True):
        getattr(_backend.cuda, f"enable_{name}_sdp")(enabled)


def _set_signals(was: list[Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in zip(_SIGNALS, was, strict=True):
            signal.signal(number, handler)


def _autocast() -> dict[str, tuple[bool, torch.dtype]]:
    return {each: (torch.is_autocast_enabled(each), torch.get_autocast_dtype(each)) for each in ("cpu", "cuda")}


def _set_autocast(was: dict[str, tuple[bool, torch.dtype]]) -> None:
    for device_type, (enabled, dtype) in was.items():
        torch.set_autocast_enabled(device_type, enabled)
        torch.set_autocast_dtype(device_type, dtype)


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    return partial(getattr, owner, name), partial(setattr, owner, name)


_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (
        lambda: str(torch.get_default_device()), lambda was: torch.set_default_device(None if was == "cpu" else was)
    ),
    "deterministic algorithms": (
        _deterministic, lambda was: torch.use_deterministic_algorithms(was[0], warn_only=was[1])
    ),
    "filling of memory": _attribute(torch.utils.deterministic, "fill_uninitialized_memory"),
    "gradients enabled": (torch.is_grad_enabled, torch.set_grad_enabled),
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "threads of backward passes": (torch._C._is_multithreading_enabled, torch._C._set_multithreading_enabled),
    "autocast": (_autocast, _set_autocast),
    "cache of autocast": (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    "flush to zero": (
        lambda: float(torch.tensor(_SUBNORMAL, dtype=torch.float32, device="cpu") * 1) == 0.0, torch.set_flush_denormal
    ),
    "anomaly mode": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "trace function": (sys.gettrace, sys.settrace),
    "profile function": (sys.getprofile, sys.setprofile),
    "cuDNN's choice by time": _attribute(_backend.cudnn, "benchmark"),
    "cuDNN's deterministic mode": _attribute(_backend.cudnn, "deterministic"),
    "oneDNN": (lambda: _onednn.enabled, _onednn.set_flags),
    "attention": (lambda: [getattr(_backend.cuda, f"{name}_sdp_enabled")() for name in _SDP], _set_sdp),
    "functions of torch": (
        lambda: {name: x for name, x in vars(F).items() if callable(x)}, lambda was: vars(F).update(was)
    ),
    "print options": (lambda: dict(vars(_printing)), lambda was: vars(_printing).update(was)),
    "repeated warnings": (torch.is_warn_always_enabled, torch.set_warn_always),
    "filters of warnings": (_blanket_filters, _filter_again),
    "NumPy's errors": (np.geterr, lambda was: np.seterr(**was)),
    "garbage collection": (gc.isenabled, lambda was: gc.enable() if was else gc.disable()),
    "environment": (_environment, _set_environment),
    "logging": (lambda: logging.root.manager.disable, logging.disable),
    "recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
    "signals": (lambda: [signal.getsignal(number) for number in _SIGNALS], _set_signals),
}  # fmt: skip
"""How each setting is read, and set, by what a finding calls it. Even setting the same may cost every later call."""

_READ: dict[str, Callable[[], Any]] = {name: read for name, (read, _) in _SETTINGS.items()} | {
    "inference mode": torch.is_inference_mode_enabled,
    _DRAWN: _random_numbers,
    # By the interface that tells backends apart; what was never set is the usual one.
    "fp32 products": lambda: tuple(each.fp32_precision.replace("none", _USUAL) for each in _backends()),
    "sums in 16 bits": lambda: tuple(getattr(torch.backends.cuda.matmul, name, None) for name in _SUMS),
    "active modes": lambda: (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
    "hooks of saved tensors": _hooks,
}
"""How everything is read."""

_MODES = ("default dtype", "deterministic algorithms", "gradients enabled", "inference mode", "autocast")
"""What may surround a call in force, the caller's own: it ends with that, which hides that it was changed."""


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
                told = f"changed: {' → '.join(_plain(was, self.values[name]))}"
                changed[name] = f"{name} {'were drawn or seeded' if name == _DRAWN else told}"
        return changed

    def restore(self) -> None:
        """Put back what can be put back, but for random numbers."""
        was = self.values
        for name, (read, put_back) in _SETTINGS.items():
            if read() != was[name]:
                put_back(was[name])
        if _READ["fp32 products"]() != was["fp32 products"]:
            for each in _backends():
                each.fp32_precision = "none"
            # By the older interface too, which cannot be read where the two differ.
            torch.set_float32_matmul_precision("highest" if was["fp32 products"][0] == _USUAL else "high")
        for name, value in zip(_SUMS, was["sums in 16 bits"], strict=True):
            if value is not None:
                setattr(torch.backends.cuda.matmul, name, value)
        while torch._C._len_torch_function_stack() > was["active modes"][0]:
            torch._C._pop_torch_function_stack()
        while torch._C._len_torch_dispatch_stack() > was["active modes"][1]:
            torch._C._pop_torch_dispatch_stack()
        while not was["hooks of saved tensors"] and _hooks():
            torch._C._autograd._pop_saved_tensors_default_hooks()


@contextmanager
def modes_unchanged(what: str) -> Iterator[None]:
    """Raises an UnusableAnswerError about `what` if the modes that it ran under are others behind it."""
    before = GlobalState.now(_MODES)
    yield
    for told in GlobalState.now(_MODES).changes(before).values():
        raise UnusableAnswerError(f"its {what} leaves other modes than it was called under: {told}")


def _plain(was: Any, now: Any) -> Iterator[str]:
    """Both in words; of tables what differs."""
    if isinstance(was, dict):
        names = [name for name in was.keys() | now.keys() if was.get(name) != now.get(name)]
        was, now = ({name: each[name] for name in names if name in each} for each in (was, now))
    return (str(value).removeprefix("torch.") for value in (was, now))
