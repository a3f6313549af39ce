"""The code that judges: what a candidate, which shares its process, must leave in place.

The golden model, the checks and the parts of torch that they call. A candidate that replaces one of them would be its
own judge; a library that does so in passing makes every verdict in its process worthless.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import CodeType, FunctionType
from typing import Any

import torch

__all__ = ["OwnCode"]

_OWN = "mxref"
_JUDGED = "mxref.kernels"
_NOTHING = object()
"""Where a class inherits what it is asked for."""


@dataclass(frozen=True)
class OwnCode:
    """One look at it.

    Attributes:
        places: for every function and class: what holds it, its name there, itself and its code, if it has any.
    """

    places: tuple[tuple[Any, str, Any, CodeType | None], ...]

    @classmethod
    def now(cls) -> OwnCode:
        """What is imported at this moment."""
        own = [module for name, module in list(sys.modules.items()) if _is_own(name)]
        places = [place for module in own for place in _places(module, vars(module))]
        classes = {value for _, _, value, _ in places if isinstance(value, type) and _is_own(value.__module__)}
        places += [place for each in classes for place in _places(each, vars(each))]
        called = {name for *_, code in places if code is not None for name in _names(code)}
        for holder in (torch, torch.Tensor):
            there = vars(holder)
            places += [(holder, name, there.get(name, _NOTHING), None) for name in called if hasattr(holder, name)]
        return cls(tuple(places))

    def restore(self) -> list[str]:
        """Put back what has been replaced since, and name it."""
        replaced = []
        for holder, name, value, code in self.places:
            now = vars(holder).get(name, _NOTHING)
            if now is not value:
                if holder in (torch, torch.Tensor) and str(getattr(now, "__module__", "")).startswith("torch."):
                    continue  # torch wraps some of its own functions when it imports more of itself
                delattr(holder, name) if value is _NOTHING else setattr(holder, name, value)
            elif code is None or _code(value) is code:
                continue
            else:
                value.__code__ = code
            replaced.append(f"{_name(holder)}.{name} was replaced")
        return replaced


def _is_own(module: str) -> bool:
    return module.split(".")[0] == _OWN and not f"{module}.".startswith(f"{_JUDGED}.")


def _places(holder: Any, names: Mapping[str, Any]) -> Iterator[tuple[Any, str, Any, CodeType | None]]:
    for name, value in list(names.items()):
        if callable(value) or isinstance(value, staticmethod | classmethod | property | cached_property):
            yield holder, name, value, _code(value)


def _code(value: Any) -> CodeType | None:
    return value.__code__ if isinstance(value, FunctionType) else None


def _names(code: CodeType) -> Iterator[str]:
    """Names that a function, or one within it, looks up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _name(holder: Any) -> str:
    return holder.__name__ if not isinstance(holder, type) else f"{holder.__module__}.{holder.__qualname__}"
